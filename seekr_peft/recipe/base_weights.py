"""Whether a base that transformers has loaded is what its files hold.

Nothing may be missing, misplaced, of another shape or NaN."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..errors import ConfigError, shown
from ..model.base_files import (
    check_base_files,
    stored_shapes,
    unsafe_weights,
)
from ..model.bitsandbytes_cpu import lacks_outer_scales
from ..model.kind import (
    check_weights,
    is_finite,
    non_finite,
)
from .base_config import resolve_name, snapshot
from .quantization import check_trainable, is_quantized, stored_name
from .schema import ModelSection

logger = logging.getLogger("seekr_peft")

_NAMED = 3
"""Tensors or tokens that a sentence names before it counts the rest."""


_NUMBER = re.compile(r"\d+")


_EXPERT = re.compile(r"(?P<layer>.*\bexperts\.)(\d+)\.(.+)")


_WEIGHT_NAMES = ("weight", "bias")


_TEXT_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LoadingReport(logging.Filter):
    """transformers' table of the weights that it did not find, kept and not shown: it is told in a sentence.

    Which tensors could not be joined into one, as experts are, transformers (5.23) says nowhere else.
    """

    unjoined: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        rows = [line.split("|") for line in record.getMessage().splitlines()]
        self.unjoined += tuple(row[0].strip() for row in rows if len(row) > 1 and row[1].strip() == "CONVERSION")
        return record.levelno >= logging.ERROR

    @contextmanager
    def instead_of_shown(self) -> Iterator[None]:
        verbosity, logger = transformers.logging.get_verbosity(), logging.getLogger("transformers.modeling_utils")
        level = logger.level
        transformers.logging.set_verbosity_error()
        logger.setLevel(logging.WARNING)
        logger.addFilter(self)
        try:
            yield
        finally:
            logger.removeFilter(self)
            logger.setLevel(level)
            transformers.logging.set_verbosity(verbosity)


def check_made_up(error: Exception, report: LoadingReport, config: Any, model: ModelSection) -> None:
    """Refuse by name what transformers failed to make up for, before it said what is missing."""
    files, name = resolve_name(model), model.name_or_path
    if report.unjoined:
        _check_experts(files, name)
        raise ConfigError(
            f"model.name_or_path: {name} lacks tensors to make weights of its model of, or holds them in unlike shapes "
            f"({_first(sorted(report.unjoined))}); download the checkpoint or save it again, whole."
        )
    if isinstance(error, NotImplementedError) and stored_name(config) in ("nf4", "fp4", "int8"):
        _check_packed(config, files, model)


def check_whole(base: Any, loaded: dict[str, Any], files: str, name: str) -> None:
    if loaded["mismatched_keys"]:
        _check_experts(files, name)
    _check_loaded(base, loaded, name)
    if is_quantized(base):
        check_trainable(base, name)
        inner = [path for path, parameter in base.named_parameters() if lacks_outer_scales(parameter)]
        _check_missing(name, [f"{path}.nested_absmax" for path in inner])
        # A quantised weight may hide what it was made of.
        _check_files(base, files, loaded["unexpected_keys"], name)


def _check_loaded(base: Any, loaded: dict[str, Any], name: str) -> None:
    """Refuse a base that is not what its files hold, by what transformers reports of loading it."""
    where = f"model.name_or_path: {name}"
    _check_shapes(name, loaded["mismatched_keys"])
    _check_missing(name, loaded["missing_keys"])
    if loaded["error_msgs"]:
        raise ConfigError(f"{where} cannot be loaded: {' '.join(' '.join(loaded['error_msgs']).split())}")
    unexpected = sorted(loaded["unexpected_keys"])
    misplaced = [key for key in unexpected if _belongs_to(base, key) or _belongs_to(base.base_model, key)]
    if misplaced:
        raise ConfigError(
            f"{where} holds weights that the model of its configuration leaves out ({_first(misplaced)}); correct its "
            f"config.json, or save the model again."
        )
    if unexpected:
        logger.warning("%s holds weights that its model does not use (%s).", name, _first(unexpected))
    check_weights(base, where, ConfigError)


def _check_missing(name: str, missing: Iterable[str]) -> None:
    tensors = sorted(missing)
    if tensors:
        raise ConfigError(
            f"model.name_or_path: {name} lacks weights of its model, which would be random numbers "
            f"({_first(tensors)}); download the checkpoint or save it again, whole."
        )


def _check_shapes(name: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    shapes = [f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(mismatched)]
    if shapes:
        raise ConfigError(
            f"model.name_or_path: {name} holds weights of other shapes than its configuration says ({_first(shapes)}); "
            f"correct its config.json, or save the model again."
        )


def _belongs_to(root: nn.Module, key: str) -> bool:
    """Whether the unused weight ``key`` would be part of what ``root`` computes: in a layer, or beyond the last.

    What hangs elsewhere (heads of other uses, buffers of older versions) would not."""
    *path, name = key.split(".")
    module, in_layers = root, False
    for part in path:
        in_layers = in_layers or isinstance(module, nn.ModuleList)
        children = dict(module.named_children())
        if part not in children:
            return in_layers and name in _WEIGHT_NAMES
        module = children[part]
    return name in _WEIGHT_NAMES and not any(True for _ in module.children())


def _check_files(base: Any, name: str, unused: set[str], shown: str) -> None:
    """Refuse what quantised weights hide of the checkpoint's files: other shapes, NaN and infinity.

    Reads a tensor at a time, in 0.04 s for a GB beside the reading itself.
    """
    shapes = _linear_shapes(base)
    for path in _weight_files(name):
        with safe_open(path, framework="pt") as file:
            for key in sorted(set(file.keys()) - unused):
                tensor = file.get_tensor(key)
                wanted = shapes.get(key, tensor.shape)
                # GPT-2 keeps its matrices transposed.
                if tensor.is_floating_point() and sorted(tensor.shape) != sorted(wanted):
                    _check_shapes(shown, [(key, tensor.shape, wanted)])
                if not is_finite(tensor):
                    raise ConfigError(non_finite(f"model.name_or_path: {shown}", key))


def _check_experts(files: str, name: str) -> None:
    """Refuse a checkpoint of which an expert lacks a tensor that others have, or has it in another shape.

    transformers (5.23) joins the experts of a layer into one tensor, and names that or, where it fails, none at all.
    """
    shapes = stored_shapes(_weight_files(files))
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for match in filter(None, map(_EXPERT.fullmatch, shapes)):
        kinds.setdefault(_NUMBER.sub("*", match["layer"]), []).append(match.groups())
    for found in kinds.values():
        layers, experts, parts = map(set, zip(*found, strict=True))
        whole = {part: [f"{layer}{expert}.{part}" for layer in layers for expert in experts] for part in parts}
        _check_missing(name, {key for keys in whole.values() for key in keys} - shapes.keys())
        for keys in whole.values():
            usual, _ = Counter(shapes[key] for key in keys).most_common(1)[0]
            _check_shapes(name, [(key, shapes[key], usual) for key in keys if shapes[key] != usual])


def _check_packed(config: Any, files: str, model: ModelSection) -> None:
    """Refuse a checkpoint of packed weights that lacks one: transformers (5.23) fails as it makes up random numbers
    for it, before it says which."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    prefix, stored, head = (
        f"{base.base_model_prefix}.",
        stored_shapes(_weight_files(files)),
        base.get_output_embeddings(),
    )
    wanted = {
        f"{path}.weight" for path, part in base.named_modules() if isinstance(part, nn.Linear) and part is not head
    }
    _check_missing(model.name_or_path, {key for key in wanted if not {key, key.removeprefix(prefix)} & stored.keys()})


def check_downloaded(error: Exception, name: str, model: ModelSection) -> None:
    """Refuse by name what is wrong with the files of a model of the hub; a folder's were looked at before."""
    if Path(name).is_dir():
        return
    if isinstance(error, OSError) and "cannot be loaded with `safetensors`" in str(error):
        # transformers (5.23) has no class for it.
        raise ConfigError(unsafe_weights(model.name_or_path, "pytorch_model.bin"))
    if _weight_files(name):
        check_base_files(snapshot(name), model.name_or_path, model.use_safetensors)


def _linear_shapes(base: Any) -> dict[str, tuple[int, int]]:
    """Of each linear layer's weight, under the names that a file may have it by, with the head's prefix or without."""
    prefix = f"{base.base_model_prefix}."
    found = {
        f"{path}.weight": (module.out_features, module.in_features)
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {**found, **{key.removeprefix(prefix): shape for key, shape in found.items()}}


def _weight_files(name: str) -> list[str]:
    """The checkpoint's safetensors files, of a folder or of the hub's cache; none of an older format."""
    try:
        return [cached_file(name, SAFE_WEIGHTS_NAME)]
    except OSError:
        pass
    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME)
    except OSError:
        return []
    return list(get_checkpoint_shard_files(name, index)[0])


def check_tokens(tokenizer: Any, rows: int, name: str) -> None:
    """Refuse a tokenizer with tokens that a model of ``rows`` embeddings cannot read.

    Left out are names for what text never holds (a place for an image, in the tokenizer that Gemma 3's text model
    shares with those that see).

    Raises:
        ConfigError: There is such a token.
    """
    named = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    other_senses = {token for key, token in named.items() if key not in _TEXT_TOKENS}
    beyond = sorted(
        (index, token) for token, index in tokenizer.get_vocab().items() if index >= rows and token not in other_senses
    )
    if beyond:
        tokens = [f"{shown(token)} is {index}" for index, token in beyond]
        raise ConfigError(
            f"model.name_or_path: the tokenizer of {name} has token ids beyond the model's {rows} embeddings "
            f"({_first(tokens)}); call model.resize_token_embeddings(len(tokenizer)) and save the model, or take the "
            f"tokens out of the tokenizer."
        )


def _first(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
