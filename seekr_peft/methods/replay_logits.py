"""Replay with the teacher's logits, in the manner of DER++ (arXiv 2004.07211)."""

from __future__ import annotations

from typing import ClassVar

from .seekr import Seekr


class ReplayLogits(Seekr):
    """SEEKR without attention: labels and the answer distributions of the model as it was right after the task.

    DER++ matches raw logits by their squared error; here it is the KL divergence, as in SEEKR's own logits term.
    """

    name: ClassVar[str] = "replay_logits"
    teacher_signals: ClassVar[tuple[str, ...]] = ("logits",)
