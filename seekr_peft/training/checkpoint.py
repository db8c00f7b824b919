"""Checkpoints inside a task: what a trainer holds, as safetensors and JSON.

A checkpoint is a folder with a manifest: ``adapter/`` (the current task's, a plain PEFT adapter), ``training.json`` and
``training.safetensors`` (optimizer, scheduler, random numbers, the place in the replay stream, the losses that are not
logged yet) and transformers' ``trainer_state.json``.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ConfigError, RunError, shown
from ..files.atomic import save_tensors, write_json
from ..files.manifest import MANIFEST_FILE, folder_damages, read_manifest

logger = logging.getLogger("seekr_peft")

ADAPTER = "adapter"
TRAINER_STATE = "trainer_state.json"
_TRAINING = "training"
_NAME = re.compile(r"checkpoint-(\d+)")
_PLAIN = (str, int, float, bool, type(None))


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints and damaged ones in ``folder``, the latest last; not those that a kill left unfinished."""
    found = [(int(match[1]), path) for path in _entries(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def latest_checkpoint(folder: Path, made_from: dict[str, Any]) -> Path | None:
    """The latest checkpoint in ``folder`` of the task in progress; those of other tasks are passed over.

    Raises:
        RunError: It is damaged.
    """
    for path in reversed(checkpoints_in(folder)):
        if not (path / MANIFEST_FILE).exists() and not (path / ADAPTER).is_dir():
            logger.warning("%s is passed over: it is no checkpoint of a ContinualTrainer.", path)
        elif _is_of(path, made_from):
            check_whole(path)
            return path
    return None


def _is_of(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether a checkpoint is of the task in progress; one that cannot be read may be."""
    try:
        return _other_task(read_manifest(path)["made_from"], made_from) is None
    except RunError:
        return True


def check_whole(folder: Path) -> None:
    """RunError that names the first file of a checkpoint that is not what was written."""
    if not (folder / MANIFEST_FILE).is_file() and not (folder / ADAPTER).is_dir():
        raise RunError(
            f"{folder} is no checkpoint of a ContinualTrainer (it has no {MANIFEST_FILE}); give one, such as "
            f"output_dir/checkpoint-100."
        )
    for damage in folder_damages(folder):
        raise RunError(f"{damage}; delete or move away the checkpoint {folder}, and go on from the one before it.")


def check_made_from(folder: Path, made_from: dict[str, Any]) -> None:
    """ConfigError for a checkpoint of another task, base or training than ``made_from`` says."""
    found = read_manifest(folder)["made_from"]
    other = _other_task(found, made_from)
    if other is not None:
        raise ConfigError(f"the checkpoint {folder} {other}; give one of the task in progress.")
    before, now = found.get("settings", {}), made_from["settings"]
    for name in now:
        if before.get(name) != now[name]:
            raise ConfigError(
                f"the checkpoint {folder} was made with {name}={shown(before.get(name))}, this training has "
                f"{shown(now[name])}; go on with the same settings, or train the task from its beginning."
            )


def _other_task(found: dict[str, Any], made_from: dict[str, Any]) -> str | None:
    """What a checkpoint is of, where it is not of the task in progress."""
    if found.get("task") != made_from["task"]:
        return f"is of task {found.get('task')!r}, and {made_from['task']!r} is being trained"
    if found.get("earlier") != made_from["earlier"]:
        return "was made after other earlier tasks"
    for key, words in (("base", "over another base model"), ("recipe", "by another recipe"), ("data", "of other data")):
        if key in made_from and found.get(key) != made_from[key]:
            return f"was made {words}"
    return None


def save_training(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state``, nested dicts, lists and tuples of plain values and tensors; no code is needed to read it.

    Raises:
        ConfigError: Something in it is of another kind, such as an optimizer's own class.
    """
    tensors: dict[str, Tensor] = {}
    document = _packed(state, "", tensors)
    save_tensors(tensors, folder / f"{_TRAINING}.safetensors")
    write_json(folder / f"{_TRAINING}.json", document)


def load_training(folder: Path) -> dict[str, Any]:
    """What ``save_training`` wrote; its tensors are on the CPU.

    Raises:
        RunError: The checkpoint holds an adapter alone, or cannot be read.
    """
    path = folder / f"{_TRAINING}.json"
    if not path.is_file():
        raise RunError(
            f"{folder} holds no optimizer (save_only_model was set), so no training can go on from it; train the task "
            f"from its beginning."
        )
    try:
        tensors = load_file(path.with_suffix(".safetensors"))
        return dict(_unpacked(json.loads(path.read_text(encoding="utf-8")), tensors))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be read ({error}); go on from the checkpoint before it.") from error


def random_state() -> dict[str, Any]:
    """The state of every global random number generator: Python's, numpy's, torch's."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what ``random_state`` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``; its tensors go into ``tensors``. Kinds are written down: JSON knows no tuple, and no key but
    text."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {"dict": [[_packed(k, place, tensors), _packed(v, f"{place}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]}
    raise ConfigError(
        f"a checkpoint cannot hold {shown(value)} ({type(value).__name__}, at {place[1:]}) as numbers and text; use "
        f"another optimizer or scheduler, or save_strategy 'no'."
    )


def _unpacked(document: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(document, dict):
        return document
    ((kind, content),) = document.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(value, tensors) for key, value in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
