"""Methods on two tiny tasks, as their tests make and train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seekr_peft.config import SeekrConfig
from seekr_peft.methods import Seekr
from support.core_models import fresh_peft, make_dataset, randomise, train_by_hand
from support.tiny_models import (
    VOCABULARY,
)

FIRST, SECOND = make_dataset(20, seed=1), make_dataset(20, seed=2)


def make_config(**changes: Any) -> SeekrConfig:
    settings = {
        "replay_ratio": 0.2,
        "layer_budget": 2,
        "head_budget": 5,
        "query_budget": 5,
        "replay_every": 2,
        "replay_batch_size": 3,
        "storage_dtype": "float32",
        "row_top_k": 99,
        "logit_top_k": VOCABULARY,
        "teacher_loss_limit": 1e9,
        "teacher_entropy_limit": 1e9,
    }
    return SeekrConfig(**{**settings, **changes})


def make_method(kind: type = Seekr, model: Any = None, directory: Path | None = None, **changes: Any) -> Any:
    options = {key: changes.pop(key) for key in ("adapter_mode", "rank_limit", "select_samples") if key in changes}
    return kind(model or fresh_peft(), make_config(**changes), directory=directory, **options)


def do_task(method: Any, name: str, dataset: list, steps: int = 4) -> list[bool]:
    with method.task(name, replay_from=dataset, optimizer_steps=steps):
        return train_by_hand(method, dataset, steps)


def open_second(kind: type = Seekr, **changes: Any) -> Any:
    """A method whose first task is learnt; its second one is open, with an adapter that already changed."""
    torch.manual_seed(0)
    method = make_method(kind, **changes)
    do_task(method, "first", FIRST)
    block = method.task("second", replay_from=SECOND, optimizer_steps=100)
    block.__enter__()
    method.open_block = block  # an open generator that is collected would close the task
    randomise(method.stack.parameters(), 5, scale=0.03)
    return method


def gradients(method: Any) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in method.stack.parameters().items() if p.grad is not None}
    method.model.zero_grad()
    return found


def next_loss(method: Any) -> Tensor:
    """The replay loss of the next step that has one."""
    for _ in range(100):
        loss = method.replay_loss()
        if loss is not None:
            return loss
    raise AssertionError("no replay fell due in 100 steps")
