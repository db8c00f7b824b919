"""A base's configuration, read and looked through before a model is made of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from ..attention.models import EAGER
from ..errors import ConfigError, SeekrError, cut, shown
from ..model.base_files import (
    CONFIG,
    DEMO_BASE,
    check_base_files,
    read_configuration,
    stored_shapes,
    weight_files,
)
from ..model.kind import (
    causal_class,
    check_checkpoint,
    stored_quantization,
)
from .quantization import check_quantization
from .schema import DEMO, ModelSection

_LONGEST_DETAIL = 500
"""Characters of a library's own words that a sentence repeats."""


_LARGER, _SMALL, _FEW = 3, 10**8, 1000
"""How much larger than its files a model may be: tied weights are there twice, buffers are not in the files; and so
many values and tensors on top."""


_PACKED = 16
"""Weights that a stored number may stand for, in a quantised checkpoint."""


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
            read_configuration(snapshot(files), model.name_or_path)
        with panics_are_errors():
            config = AutoConfig.from_pretrained(files, trust_remote_code=model.trust_remote_code)
    except SeekrError:
        raise
    except Exception as error:
        # What a configuration's class does not check itself fails in many ways.
        raise ConfigError(
            f"model.name_or_path: the configuration of {model.name_or_path} cannot be read: {one_line(error)}"
        ) from error
    _check_fields(config, model.name_or_path)
    check_checkpoint(config, model.name_or_path, model.trust_remote_code)
    check_quantization(model, config)
    _check_size(config, files, model)
    return config


def snapshot(name: str) -> Path:
    """The folder of the hub's cache that ``name``'s files are downloaded into."""
    return Path(cached_file(name, CONFIG)).parent


@contextmanager
def panics_are_errors() -> Iterator[None]:
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


def one_line(error: Exception) -> str:
    detail = cut(" ".join(str(error).split()), _LONGEST_DETAIL)
    return detail if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {detail}"


def resolve_name(model: ModelSection) -> str:
    """The folder or hub name that ``from_pretrained`` takes."""
    if model.name_or_path == DEMO:
        return str(DEMO_BASE)
    return str(Path(model.name_or_path).expanduser()) if model.name_or_path.startswith("~") else model.name_or_path
