"""The files of a base model's folder, looked at before a library reads them.

transformers, tokenizers and safetensors each fail in their own way on a damaged file, or do not fail at all. Here each
file that they would read is opened first: JSON, text, the headers of the weights; no tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError, cut, shown
from ..files.paths import reason, special_kind
from .plain_lora import adapter_in_base

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo" / "base"
"""Folder of the demo's base model and tokenizer, as ``demo.train_base`` wrote it."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_OBJECTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    INDEX,
)
_READ = re.compile(r".*\.(json|safetensors|bin|jinja|txt|model)")
"""What the libraries read of a folder."""

_RUNS_CODE = re.compile(r"(pytorch|adapter)_model.*\.bin(\.index\.json)?")
_LFS_POINTER = b"version https://git-lfs"
_COUNTS = re.compile("layer|block|expert|depth|label")
_MOST, _MOST_IN_A_LIST = 100_000, 10**7
"""Layers, blocks, experts or labels that no model has, and that a library would make a list of; in a list, as GPT-Neo's
attention_types, any number may be such a count."""


def check_base_files(folder: Path, name: str, use_safetensors: bool = True) -> None:
    """Refuse the model folder ``folder``, which the user calls ``name``, for the first file that is not whole.

    Raises:
        ConfigError: A file cannot be read, is no JSON object, no text or no safetensors file; weights are missing; or
            there are none but in a format that can run code, and ``use_safetensors`` was not set to false.
    """
    if beside := adapter_in_base(folder):
        raise ConfigError(f"model.name_or_path: {name} {beside}")
    if not os.path.lexists(folder / CONFIG):
        raise ConfigError(f"model.name_or_path: {name} has no {CONFIG}; give a model folder or a name on the hub.")
    config = read_configuration(folder, name)
    where = f"model.name_or_path: {name} cannot be loaded: "
    for path in _files(folder, where):
        _check_file(path, where)
    _check_weights(folder, name, where, use_safetensors, config.get("transformers_weights"))


def read_configuration(folder: Path, name: str) -> dict[str, Any]:
    """The object in ``config.json``; ConfigError when it has none, or counts more layers than any model has."""
    where = f"model.name_or_path: the configuration of {name} cannot be read: "
    config = _read_object(folder / CONFIG, where)
    for key, value in _entries(config):
        if isinstance(value, int) and value > (_MOST if _COUNTS.search(key) else math.inf):
            raise ConfigError(f"{where}{CONFIG} says {cut(key)}: {shown(value)}, which no model has; correct it.")
        if isinstance(value, list) and (largest := _largest(value)) > _MOST_IN_A_LIST:
            raise ConfigError(
                f"{where}{CONFIG} says {cut(key)} with {shown(largest)} in it, which no model has; correct it."
            )
    return config


def stored_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Of every tensor in safetensors files; none of them is read."""
    shapes = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())})
    return shapes


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value, at any depth."""
    # Not by calling itself: a document may be as deep as Python's own calls.
    left = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []


def _largest(document: list[Any]) -> int:
    """Of the whole numbers in nested lists; those in a mapping have a key of their own."""
    largest, left = 0, [document]
    while left:
        items = left.pop()
        left += [item for item in items if isinstance(item, list)]
        largest = max([largest, *(item for item in items if isinstance(item, int))])
    return largest


def _files(folder: Path, where: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _READ.fullmatch(path.name))
    except OSError as error:
        raise ConfigError(f"{where}its folder cannot be read ({reason(error)}); change its permissions.") from error


def _check_file(path: Path, where: str) -> None:
    try:
        kind = special_kind(path) or ("is a folder" if path.is_dir() else None)
        pointer = not kind and _starts_with(path, _LFS_POINTER)
    except OSError as error:
        raise ConfigError(f"{where}{path.name} cannot be read ({reason(error)}); put the file back.") from error
    if kind:
        raise ConfigError(f"{where}{path.name} {kind}; put the file back.")
    if pointer:
        raise ConfigError(
            f"{where}a file is not there; {path.name} only points to a file that Git LFS keeps elsewhere: was it "
            f"downloaded whole?"
        )
    if path.name in _OBJECTS:
        _read_object(path, where)
    elif path.suffix in (".jinja", ".txt"):
        _read_text(path, where)


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        document = json.loads(_read_text(path, where))
    except RecursionError as error:
        raise ConfigError(f"{where}{path.name} is nested too deeply to be read; put the file back.") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}{path.name} is no JSON ({error}); put the file back.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{where}{path.name} is no JSON object, but {shown(document)}; put the file back.")
    return document


def _read_text(path: Path, where: str) -> str:
    try:
        if kind := special_kind(path):
            raise ConfigError(f"{where}{path.name} {kind}; put the file back.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}{path.name} is not UTF-8 text (byte {error.start}); put the file back.") from error
    except OSError as error:
        raise ConfigError(f"{where}{path.name} cannot be read ({reason(error)}); put the file back.") from error


# Weights ------------------------------------------------------------------------------------------------------------


def _check_weights(folder: Path, name: str, where: str, use_safetensors: bool, explicit: Any) -> None:
    if explicit is not None and not _is_plain(explicit, ".safetensors", ".safetensors.index.json"):
        raise ConfigError(
            f"{where}{CONFIG} says transformers_weights: {shown(explicit)}, which is no safetensors file of its "
            f"folder; take that key out."
        )
    files = weight_files(folder, explicit, where)
    for path in files:
        _check_safetensors(path, where)
    risky = sorted(path.name for path in folder.iterdir() if _RUNS_CODE.fullmatch(path.name))
    # Without any, the configuration still says what a model of it would need.
    if risky and not files and use_safetensors:
        raise ConfigError(unsafe_weights(name, risky[0]))


def unsafe_weights(name: str, file: str) -> str:
    """The sentence on a base whose weights are in ``file`` alone."""
    return (
        f"model.name_or_path: {name} has its weights in {file} alone, a format that can run any code when it is read; "
        f"convert it once, where you trust it, with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
        f".save_pretrained(OTHER), or set model.use_safetensors: false to read it all the same."
    )


def weight_files(folder: Path, explicit: str | None = None, where: str = "") -> list[Path]:
    """The safetensors files that transformers would choose: the one that the configuration names, or the usual one, or
    those of the index; none of an older format."""
    chosen = explicit or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    if not chosen.endswith(".json"):
        return [folder / chosen]
    return _shards(folder / chosen, where) if (folder / chosen).is_file() else []


def _shards(path: Path, where: str) -> list[Path]:
    index = _read_object(path, where)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError(f"{where}{path.name} has no weight_map of tensors and their files; put the file back.")
    for file in shards.values():
        if not _is_plain(file, ".safetensors"):
            raise ConfigError(
                f"{where}{path.name} names {shown(file)}, which is no safetensors file of its folder; put the file "
                f"back."
            )
    # transformers (5.23) loads none without.
    if not isinstance(index.get("metadata"), dict):
        raise ConfigError(f"{where}{path.name} has no metadata; put the file back.")
    return [path.with_name(file) for file in sorted(set(shards.values()))]


def _is_plain(file: Any, *endings: str) -> bool:
    """Whether ``file`` is the name of a file with one of the endings, and leads into no other folder."""
    return isinstance(file, str) and not set(file) & set("/\\\0") and file.endswith(endings) and len(file) < 256


def _check_safetensors(path: Path, where: str) -> None:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except SafetensorError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{where}{cut(detail)}; {path.name} is cut off or damaged: was it downloaded whole?"
        ) from error
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else ""
        what = f"cannot be read ({why})" if why else "is missing"
        raise ConfigError(f"{where}a shard is not there; {path.name} {what}: was it downloaded whole?") from error
