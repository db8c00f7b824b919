"""What the terms of the loss are called in logs, in metrics.jsonl and to a person; whoever shows them asks here.

A term NAME of a method is logged as ``NAME_loss``, the new task's own as ``loss``.
"""

from __future__ import annotations

from collections.abc import Iterable

NEW_TASK = "loss"
PENALTY = "penalty"
"""The term that a method puts on the parameters themselves."""
_SUFFIX = "_loss"


def logged_name(term: str) -> str:
    """The key of the term ``term`` in logs and in metrics.jsonl."""
    return f"{term}{_SUFFIX}"


def logged_terms(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are terms of a loss, each once, in order, the new task's first."""
    found = dict.fromkeys(key for key in keys if key == NEW_TASK or key.endswith(_SUFFIX))
    return sorted(found, key=lambda key: key != NEW_TASK)


def short_label(key: str) -> str:
    """What a progress bar calls the logged term ``key``: "new", or the term's own name."""
    return "new" if key == NEW_TASK else key.removesuffix(_SUFFIX)


def long_label(key: str) -> str:
    """What a report calls the logged term ``key``."""
    return "task loss" if key == NEW_TASK else key.replace("_", " ")
