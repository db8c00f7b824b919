"""Whether a learning rate schedule can be made: by making it, as which keywords one takes is only in its function."""

from __future__ import annotations

import math
from typing import Any

from ..errors import cut, shown
from .annotations import is_number
from .library_fields import training_choices

_PLAIN_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_WITHOUT_KEYWORDS = ("constant", "constant_with_warmup")
_NEEDS_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def scheduler_problems(training: dict[str, Any]) -> list[str]:
    """What is wrong with ``lr_scheduler_kwargs``, or with a type that needs some, in one sentence; an unknown type is
    told elsewhere."""
    known = training.get("lr_scheduler_type", "linear")
    if not (isinstance(known, str) and known in training_choices()["lr_scheduler_type"]):
        return []
    name, keywords = training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs")
    if name in _NEEDS_A_METRIC:
        return [
            f"training.lr_scheduler_type {name!r} needs a metric during training, and none is measured; try cosine."
        ]
    if keywords is not None and not isinstance(keywords, dict):
        # It is told by its type.
        return []
    if not keywords and name in (None, *_PLAIN_SCHEDULERS):
        return []
    if name in _WITHOUT_KEYWORDS:
        return [f"training.lr_scheduler_kwargs {shown(keywords)}: {name} takes none; leave them out."]
    why = _why_no_schedule(name or "linear", keywords, training.get("learning_rate", 5e-5))
    if why and keywords:
        return [f"training.lr_scheduler_kwargs {shown(keywords)} do not fit {name or 'linear'}: {why}"]
    return [f"training.lr_scheduler_type {name} needs training.lr_scheduler_kwargs: {why}"] if why else []


def _why_no_schedule(name: str, keywords: dict[str, Any] | None, rate: Any) -> str:
    # Seconds, and only for a recipe that asks for such a scheduler.
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate if is_number(rate) and 0 < rate < 1000 else 5e-5)
    try:
        scheduler = get_scheduler(name, optimizer, 1, 2, scheduler_specific_kwargs=keywords)
        for _ in range(4):
            # Past the warmup: some keywords are only looked at then.
            optimizer.step()
            scheduler.step()
            _check_rate(scheduler.get_last_lr()[0])
    except Exception as error:
        # Whatever a keyword of the wrong kind leads to.
        return cut(" ".join(str(error).split()) or type(error).__name__)
    return ""


def _check_rate(rate: float) -> None:
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"the learning rate becomes {rate}")
