"""The configurations of the methods that are not built on replay, apart from their classes: these load torch, and a
recipe is checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MethodConfig, RhythmConfig
from ..validation import Count, Positive, Weight


@dataclass(frozen=True)
class LwfConfig(RhythmConfig):
    """Settings of method lwf; its batches are of the new task's own samples, one every step by default."""

    lwf_lambda: Weight = 1.0
    """Weight of the distillation on the new task's samples. Paper (arXiv 1606.09282): 1."""

    lwf_temperature: Positive = 2.0
    """Temperature of that distillation. Paper: 2."""


@dataclass(frozen=True)
class EwcConfig(MethodConfig):
    """Settings of method ewc."""

    ewc_lambda: Weight = 1.0
    """Weight of the penalty; each task's Fisher information is scaled to a mean of 1."""

    ewc_samples: Count = 64
    """Training samples that a task's Fisher information is estimated from."""


@dataclass(frozen=True)
class OLoraConfig(MethodConfig):
    """Settings of method olora."""

    olora_lambda: Weight = 0.5
    """Weight of the orthogonality penalty, as in the O-LoRA paper (arXiv 2310.14152)."""
