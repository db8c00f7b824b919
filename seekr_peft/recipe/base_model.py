"""Load a recipe's base model, tokenizer and LoRA adapter, and refuse those that are not whole."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..attention.models import EAGER
from ..errors import ConfigError, SeekrError, cut, shown
from ..model.adapter_stack import check_no_hidden_adapter
from ..model.base_files import (
    CONFIG,
    DEMO_BASE,
    check_base_files,
    read_configuration,
    stored_shapes,
    unsafe_weights,
    weight_files,
)
from ..model.bitsandbytes_cpu import lacks_outer_scales
from ..model.facts import ModelFacts
from ..model.kind import (
    causal_class,
    check_checkpoint,
    check_weights,
    is_finite,
    non_finite,
    stored_quantization,
)
from ..tasks import check_chat_template, prepare_tokenizer
from .schema import DEMO, ModelSection, Recipe

logger = logging.getLogger("seekr_peft")

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The training argument that switches checkpointing on, under its new and its old name."""


_NAMED = 3
"""Tensors or tokens that a sentence names before it counts the rest."""

_LONGEST_DETAIL = 500
"""Characters of a library's own words that a sentence repeats."""

_LARGER, _SMALL, _FEW = 3, 10**8, 1000
"""How much larger than its files a model may be: tied weights are there twice, buffers are not in the files; and so
many values and tensors on top."""

_PACKED = 16
"""Weights that a stored number may stand for, in a quantised checkpoint."""

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"(?P<layer>.*\bexperts\.)(\d+)\.(.+)")
_WEIGHT_NAMES = ("weight", "bias")
_TEXT_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_model(recipe: Recipe) -> tuple[PeftModel, Any]:
    """The quantised base with one fresh LoRA adapter, and its tokenizer (with a pad token).

    Raises:
        ConfigError: The base is no causal language model of text, its weights are not whole (missing, of another shape,
            NaN), or its tokenizer has tokens that it has no embeddings for.
    """
    config = read_config(recipe.model)
    tokenizer, base = _load(recipe.model, config, recipe.tasks.chat_template)
    check_no_hidden_adapter(base)
    check_tokens(tokenizer, ModelFacts.of(base).embedding_rows, recipe.model.name_or_path)
    base.config.use_cache = False
    if _is_quantized(base):
        # PEFT's own default is reentrant checkpointing, under which a captured attention has no gradient.
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=any(recipe.training.get(name) for name in CHECKPOINTING),
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return add_adapter(base, recipe), tokenizer


def read_config(model: ModelSection) -> Any:
    """The base's configuration.

    Raises:
        ConfigError: It cannot be read, is of a model that cannot be trained here, or of one that is stored in another
            quantisation than is asked for.
    """
    files = resolve_name(model)
    try:
        if Path(files).exists():
            check_base_files(Path(files), model.name_or_path, model.use_safetensors)
        else:
            read_configuration(_snapshot(files), model.name_or_path)
        with _panics_are_errors():
            config = AutoConfig.from_pretrained(files, trust_remote_code=model.trust_remote_code)
    except SeekrError:
        raise
    except Exception as error:
        # What a configuration's class does not check itself fails in many ways.
        raise ConfigError(
            f"model.name_or_path: the configuration of {model.name_or_path} cannot be read: {_one_line(error)}"
        ) from error
    _check_fields(config, model.name_or_path)
    check_checkpoint(config, model.name_or_path, model.trust_remote_code)
    _check_quantization(model, config)
    _check_size(config, files, model)
    return config


def _snapshot(name: str) -> Path:
    """The folder of the hub's cache that ``name``'s files are downloaded into."""
    return Path(cached_file(name, CONFIG)).parent


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """A panic of tokenizers' or safetensors' Rust code as an Exception; PyO3 (0.27) derives it from BaseException, and
    exports no name for it."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"a library failed on it ({error})") from error


def _check_fields(config: Any, name: str) -> None:
    """Refuse fields that transformers (5.23) leaves unchecked and that are read here."""
    where = f"model.name_or_path: the configuration of {name} cannot be read: {CONFIG} says "
    architectures, quantization = (getattr(config, key, None) for key in ("architectures", "quantization_config"))
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(each, str) for each in architectures)
    ):
        raise ConfigError(f"{where}architectures: {shown(architectures)}, which is no list of names; correct it.")
    if quantization is not None and not (isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ConfigError(f"{where}quantization_config: {shown(quantization)}, which is no mapping; correct it.")


def _check_size(config: Any, files: str, model: ModelSection) -> None:
    """Refuse a configuration of a far larger model than the folder's weights are of: transformers would make room for
    all of it before it says which weights are missing."""
    if not Path(files).is_dir():
        return
    shapes = stored_shapes(weight_files(Path(files), getattr(config, "transformers_weights", None)))
    if not shapes:
        return
    packed = _PACKED if stored_quantization(config) else 1
    most = packed * _LARGER * sum(map(math.prod, shapes.values())) + _SMALL
    try:
        with _at_most(most, _LARGER * len(shapes) + _FEW), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except _TooLargeError:
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path} cannot be loaded: its {CONFIG} is of a far larger model than "
            f"the {len(shapes)} tensors of its files are of; correct {CONFIG}, or download the model again."
        ) from None
    except Exception:
        # Loading it will say so, in its own words.
        return


class _TooLargeError(Exception):
    pass


@contextmanager
def _at_most(n_values: int, n_tensors: int) -> Iterator[None]:
    """Stop the making of a model that has more parameters and buffers than these."""
    values = tensors = 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal values, tensors
        values, tensors = values + (0 if tensor is None else tensor.numel()), tensors + 1
        if values > n_values or tensors > n_tensors:
            raise _TooLargeError

    handles = [
        nn.modules.module.register_module_parameter_registration_hook(count),
        nn.modules.module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_implementation(wanted: str, config: Any) -> str:
    """``wanted``, but eager attention in place of sdpa where the model's family (GPT-Neo, Bloom) has no other."""
    model_class, _ = causal_class(config)
    if wanted == "sdpa" and not getattr(model_class, "_supports_sdpa", True):
        return EAGER
    return wanted


def _load(model: ModelSection, config: Any, chat: bool) -> tuple[Any, Any]:
    name = resolve_name(model)
    common = {"trust_remote_code": model.trust_remote_code}
    report = _LoadingReport()
    try:
        with _panics_are_errors():
            tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(name, **common))
            # Some damage (a model_max_length that is a list) only shows in use.
            tokenizer.decode(tokenizer("a b")["input_ids"])
        if chat:
            check_chat_template(tokenizer)
        with report.instead_of_shown(), _panics_are_errors():
            base, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=compute_dtype(model),
                attn_implementation=attention_implementation(model.attn_implementation, config),
                device_map={"": 0} if torch.cuda.is_available() else None,
                output_loading_info=True,
                # False would leave safetensors aside where both are there.
                use_safetensors=model.use_safetensors or None,
                # They are told below, by name.
                ignore_mismatched_sizes=True,
                **_quantization_options(model, config),
                **common,
            )
        _check_whole(base, loaded, name, model.name_or_path)
    except (MemoryError, torch.OutOfMemoryError, SeekrError):
        raise
    except Exception as error:
        # A broken file, a package that is missing, a setting that the family does not have.
        _check_made_up(error, report, config, model)
        _check_downloaded(error, name, model)
        raise ConfigError(f"model.name_or_path: {model.name_or_path} cannot be loaded: {_one_line(error)}") from error
    return tokenizer, base


class _LoadingReport(logging.Filter):
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


def _check_made_up(error: Exception, report: _LoadingReport, config: Any, model: ModelSection) -> None:
    """Refuse by name what transformers failed to make up for, before it said what is missing."""
    files, name = resolve_name(model), model.name_or_path
    if report.unjoined:
        _check_experts(files, name)
        raise ConfigError(
            f"model.name_or_path: {name} lacks tensors to make weights of its model of, or holds them in unlike shapes "
            f"({_first(sorted(report.unjoined))}); download the checkpoint or save it again, whole."
        )
    if isinstance(error, NotImplementedError) and _stored_name(config) in ("nf4", "fp4", "int8"):
        _check_packed(config, files, model)


def _check_whole(base: Any, loaded: dict[str, Any], files: str, name: str) -> None:
    if loaded["mismatched_keys"]:
        _check_experts(files, name)
    _check_loaded(base, loaded, name)
    if _is_quantized(base):
        _check_trainable(base, name)
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


def _check_downloaded(error: Exception, name: str, model: ModelSection) -> None:
    """Refuse by name what is wrong with the files of a model of the hub; a folder's were looked at before."""
    if Path(name).is_dir():
        return
    if isinstance(error, OSError) and "cannot be loaded with `safetensors`" in str(error):
        # transformers (5.23) has no class for it.
        raise ConfigError(unsafe_weights(model.name_or_path, "pytorch_model.bin"))
    if _weight_files(name):
        check_base_files(_snapshot(name), model.name_or_path, model.use_safetensors)


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


def _one_line(error: Exception) -> str:
    detail = cut(" ".join(str(error).split()), _LONGEST_DETAIL)
    return detail if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {detail}"


def add_adapter(base: Any, recipe: Recipe) -> PeftModel:
    """``base`` with the recipe's LoRA adapter.

    Raises:
        ConfigError: PEFT takes a setting, such as target_modules that the model does not have, for wrong.
    """
    _check_layers(base, recipe.adapter.lora().get("layers_to_transform"))
    try:
        return get_peft_model(base, LoraConfig(**recipe.adapter.lora()))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # What LoraConfig does not check itself fails in many ways.
        raise ConfigError(f"adapter: {type(error).__name__}: {cut(' '.join(str(error).split()), 500)}") from error


def _check_layers(base: Any, wanted: int | list[int] | None) -> None:
    """ConfigError for a layer that the model does not have, of which PEFT says nothing where others fit."""
    if wanted is None:
        return
    n_layers = base.config.get_text_config().num_hidden_layers
    beyond = [layer for layer in ([wanted] if isinstance(wanted, int) else wanted) if layer >= n_layers]
    if beyond:
        raise ConfigError(
            f"adapter.layers_to_transform names layer {beyond[0]}, but the model has {n_layers}, counted from 0; leave "
            f"it out."
        )


def resolve_name(model: ModelSection) -> str:
    """The folder or hub name that ``from_pretrained`` takes."""
    if model.name_or_path == DEMO:
        return str(DEMO_BASE)
    return str(Path(model.name_or_path).expanduser()) if model.name_or_path.startswith("~") else model.name_or_path


def compute_dtype(model: ModelSection) -> torch.dtype:
    """The dtype that the layers compute in."""
    if model.bnb_4bit_compute_dtype:
        return getattr(torch, model.bnb_4bit_compute_dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _is_quantized(base: Any) -> bool:
    """Whether the base was loaded with quantised weights, by the recipe or because its files hold them so."""
    return bool(getattr(base, "is_quantized", False))


def _check_trainable(base: Any, name: str) -> None:
    # As transformers' Trainer asks; PEFT does not.
    if not base.hf_quantizer.is_trainable:
        kind = type(base.hf_quantizer.quantization_config).__name__
        raise ConfigError(
            f"model.name_or_path: {name} is stored in a quantisation through which nothing can be trained ({kind}); "
            f"use the checkpoint that it was made of, or one that is stored in nf4."
        )


def _stored_name(config: Any) -> str | None:
    """The stored quantisation as a recipe calls it, or by its method where a recipe has no name for it."""
    stored = stored_quantization(config)
    if stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type", "fp4"))
    if stored.get("load_in_8bit"):
        return "int8"
    return str(stored.get("quant_method")) if stored else None


def _check_quantization(model: ModelSection, config: Any) -> None:
    """ConfigError when the files hold another quantisation than the recipe's, which transformers would load."""
    stored = _stored_name(config)
    if stored not in (None, model.quantization) and model.quantization != "none":
        same = f"{stored} or none" if stored in ("nf4", "int8") else "none"
        raise ConfigError(
            f"model.quantization: {model.quantization} cannot be made of {model.name_or_path}, whose weights are "
            f"stored in {stored}; set model.quantization: {same}, which loads them as they are, or use the checkpoint "
            f"that it was made of."
        )


def _quantization_options(model: ModelSection, config: Any) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise, or nothing: None stands for no quantisation even where the
    files hold one."""
    if not stored_quantization(config):
        return {} if model.quantization == "none" else {"quantization_config": _quantization(model)}
    if model.quantization == "nf4":
        # How the weights are packed is a matter of the files, what they are multiplied in one of the recipe.
        config = copy.deepcopy(config)
        dtype = str(compute_dtype(model)).removeprefix("torch.")
        config.quantization_config = {**stored_quantization(config), "bnb_4bit_compute_dtype": dtype}
        return {"config": config}
    return {}


def _quantization(model: ModelSection) -> BitsAndBytesConfig:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(model),
    )
