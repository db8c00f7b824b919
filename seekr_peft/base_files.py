"""The files of a base model's folder, looked at before anything of it is loaded. May import ``errors``.

transformers passes over some that it cannot read (a generation_config.json, whose end tokens then are others), takes
the sizes in config.json as they are and asks for as much memory, and falls back to a format of weights that can run
code when it is read.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from .errors import shown

INDEX = "model.safetensors.index.json"
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    INDEX,
)
"""Files that hold a JSON object, where they are there at all."""
_RUNS_CODE = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "consolidated*.bin")
_SIZES = (
    ("vocab_size", "hidden_size"),
    ("num_hidden_layers", "hidden_size"),
    ("intermediate_size", "hidden_size"),
    ("num_attention_heads", "head_dim"),
    ("num_key_value_heads", "head_dim"),
)
"""Sizes whose product is a matrix of the model's, or a part of one."""


def folder_problem(folder: Path, use_safetensors: bool = True) -> str | None:
    """What is wrong with a model's folder and what to do, as a sentence without the folder's name; None where nothing
    is found.

    Args:
        use_safetensors: Whether weights in another format are refused.
    """
    for name in _OBJECTS:
        problem = _json_problem(folder / name)
        if problem:
            return f"has a {name} that {problem}: was it downloaded whole?"
    return _shard_problem(folder) or (_format_problem(folder) if use_safetensors else None)


def size_problem(folder: Path, config: Any) -> str | None:
    """The same for sizes in the model's text ``config`` that are beyond what its files of weights hold; so much memory
    would be asked for before anything else is noticed."""
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    if not n_bytes:
        return None
    for names in _SIZES:
        sizes = {name: getattr(config, name, None) for name in names}
        numbers = [size for size in sizes.values() if type(size) is int]
        # No format takes less than half a byte a number; the rest is room for what is tied or padded.
        if len(numbers) == len(names) and prod(numbers) > 8 * n_bytes:
            told = " and ".join(f"{name}={shown(size, 40)}" for name, size in sizes.items())
            return f"has {told} in its config.json, for which its {n_bytes} bytes of weights are too few; restore it."
    return None


def _json_problem(path: Path) -> str | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no file"
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:
        return f"is no JSON ({' '.join(str(error).split())[:200]})"
    return None if isinstance(document, dict) else f"holds no JSON object but {shown(document, 60)}"


def _shard_problem(folder: Path) -> str | None:
    """About the list of the files of weights, where there is one."""
    path = folder / INDEX
    if not path.is_file():
        return None
    names = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return f"has an {INDEX} without a weight_map of tensors to files; restore it."
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            return f"has an {INDEX} that names {shown(name)}, which is no file of the folder; restore it."
        if not (folder / name).is_file():
            return f"has no {name}, which its {INDEX} names: was it downloaded whole?"
    return None


def _format_problem(folder: Path) -> str | None:
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return None
    for path in _code_files(folder):
        return (
            f"has its weights in {path.name} alone, a format that can run code when it is read; convert it once with "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other), where you trust it, or set "
            f"model.use_safetensors: false."
        )
    return None


def _code_files(folder: Path) -> Iterator[Path]:
    for pattern in _RUNS_CODE:
        yield from sorted(folder.glob(pattern))
