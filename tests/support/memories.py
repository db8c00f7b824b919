"""Samples, teacher signals and memories made from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seekr_peft.heads import HeadSelection
from seekr_peft.memory import (
    PackedSignals,
    ReplayMemory,
    ReplaySample,
    TaskMemory,
    TeacherQuality,
    TeacherSignals,
)
from seekr_peft.sparse import SparseDistribution
from support.core_models import make_samples
from support.teachers import stored_signals
from support.tiny_models import VOCABULARY

SELECTION = HeadSelection({0: [1, 4], 2: [0, 3, 5]})


def make_signals(
    samples: list[ReplaySample],
    selection: HeadSelection = SELECTION,
    row_top_k: int = 99,
    logit_top_k: int = VOCABULARY,
    seed: int = 0,
) -> list[TeacherSignals]:
    """Random teachers: causal rows, so that trailing keys have probability 0, and peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    signals = []
    for sample in samples:
        length, n_queries = len(sample.input_ids), len(sample.queries)
        rows = {}
        for layer, heads in selection.items():
            logits = 2 * torch.randn(len(heads), n_queries, length, generator=generator)
            future = torch.arange(length) > sample.queries[:, None]
            rows[layer] = SparseDistribution.from_dense(
                logits.masked_fill(future, float("-inf")).softmax(-1), row_top_k
            )
        n_answer = int((sample.labels[1:] != -100).sum())
        logits = 2 * torch.randn(n_answer, VOCABULARY, generator=generator)
        signals.append(
            TeacherSignals(rows, SparseDistribution.from_logits(logits, logit_top_k) if logit_top_k else None)
        )
    return signals


def packed(signals: list[TeacherSignals], selection: HeadSelection, dtype: Any = "uint8") -> list[PackedSignals]:
    return [PackedSignals.of(signal, selection, dtype) for signal in signals]


def write(directory: Path, n: int = 4, dtype: str = "float32", **options: Any) -> tuple[TaskMemory, list, list]:
    samples = make_samples(n)
    signals = make_signals(samples, **options)
    quality = TeacherQuality(0.25, 0.5, True)
    memory = TaskMemory.write(directory, "task", samples, packed(signals, SELECTION, dtype), SELECTION, quality)
    return memory, samples, signals


def dense(indices: Tensor, probabilities: Tensor, size: int) -> Tensor:
    """(..., size) rows, absent entries and everything else 0."""
    return torch.zeros(*indices.shape[:-1], size).scatter_add(-1, indices, probabilities.float())


def pairs(memory: TaskMemory, samples: list, signals: list) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Dense rows read and written, remaining mass read and written, of every layer and of the logits."""
    for i, (sample, signal) in enumerate(zip(samples, signals, strict=True)):
        back = stored_signals(memory, i)
        assert set(back.rows) == {0, 2}
        length = len(sample.input_ids)
        both = [(back.rows[layer], signal.rows[layer], length) for layer in signal.rows]
        for found, stored, size in [*both, (back.logits, signal.logits, VOCABULARY)]:
            yield (
                dense(found.indices, found.probabilities, size),
                dense(stored.indices, stored.probabilities, size),
                found.remaining,
                stored.remaining.float(),
            )


def drawn(memory: ReplayMemory, batch_size: int, n_batches: int, seed: int = 0) -> list[list[int]]:
    stream = memory.stream(batch_size, seed)
    return [next(stream).input_ids[:, 0].tolist() for _ in range(n_batches)]
