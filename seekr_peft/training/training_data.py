"""What a trainer is handed: its dataset and collator, checked before the first step.

Here too: how a checkpoint tells that the data is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, RunError
from ..model.facts import ModelFacts
from ..tasks import AnswerCollator
from ..tasks.inputs import CARRIED, check_rows, check_sample
from .checkpoint import (
    check_made_from,
)

_LOOKED_AT = 64
"""Samples of a training set that tell it from another one."""


class Collated:
    """The rows of a data set as a collator makes each of them: with its labels, and without columns for no model."""

    def __init__(self, dataset: Any, collate: Any, names: frozenset[str]) -> None:
        self._dataset, self._collate, self._names = dataset, collate, {*names, "label", "label_ids"}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._dataset[index]
        check_sample(item, f"sample {index} of replay_from", self._names)
        batch = self._collate([{name: value for name, value in item.items() if name in self._names}])
        return {name: batch[name][0] for name in (*CARRIED, "position_ids") if name in batch}


def answer_collator(model: Any, names: frozenset[str]) -> Any:
    # Without a model the trainer is refused for another reason.
    if model is None:
        return list
    facts = ModelFacts.of(model)
    return AnswerCollator(facts.pad_token_id, n_tokens=facts.embedding_rows, input_names=names)


def check_tokenised(dataset: Any) -> None:
    check_rows(dataset, "train_dataset")
    # A stream has no first item to look at.
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise ConfigError(
            f"train_dataset holds {type(first).__name__} items; it needs mappings with input_ids and labels."
        )
    if "input_ids" not in first:
        raise ConfigError(
            f"train_dataset has no 'input_ids' (it has {', '.join(sorted(first))}); tokenise the task first: "
            f"task.tokenized(tokenizer)."
        )


def check_labelled(dataset: Any) -> None:
    # A stream has no first item to look at.
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return
    if "labels" not in dataset[0]:
        raise ConfigError(
            f"train_dataset has no 'labels' (it has {', '.join(sorted(dataset[0]))}); tokenise the task first: "
            f"task.tokenized(tokenizer), or pass the data_collator that makes them."
        )


def digest_of(dataset: Any) -> str:
    """What tells a training set from another one of the same length; "" for a stream, and for one whose samples are
    others each time."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        return ""
    places = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
    texts = [str(_plain_sample(dataset[place])) for place in places]
    if texts[0] != str(_plain_sample(dataset[0])):
        return ""
    return hashlib.sha256("\n".join(texts).encode(errors="replace")).hexdigest()[:16]


def _plain_sample(sample: Any) -> Any:
    if not isinstance(sample, Mapping):
        return type(sample).__name__
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in sorted(sample.items())}


def is_checkpoint_of(checkpoint: Path, made_from: dict[str, Any]) -> bool:
    try:
        check_made_from(checkpoint, made_from)
    except (RunError, ConfigError):
        return False
    return True


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def moved_to(value: Any, device: torch.device) -> Any:
    """Tensors, also those in a dict, moved to ``device``."""
    if isinstance(value, dict):
        return {name: moved_to(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
