"""A teacher's rows in the shapes that tests compare: of all tapped heads, and by layer as they come back from disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seekr_peft.attention.pairs import HeadPairs
from seekr_peft.attention.rows import row_weights
from seekr_peft.memory import TaskMemory, TeacherSignals
from seekr_peft.memory.codec import unpack
from seekr_peft.sparse import SparseDistribution


def all_heads_kl(call: Any, teacher: SparseDistribution, weights: Tensor | None = None) -> Tensor:
    """The row KL of all tapped heads of all samples, with a ``teacher`` (batch, n_selected, n_queries, k)."""
    batch, n_selected, n_queries = teacher.remaining.shape
    if weights is None:
        weights = row_weights(call.queries.real, n_selected)
    pairs = HeadPairs.of_all(call.heads, batch)
    weights = weights.expand(teacher.remaining.shape).reshape(1, -1, n_queries)
    loss: Tensor = call.pair_kl(pairs, teacher.reshape(1, -1, n_queries), weights)
    return loss


def stored_signals(memory: TaskMemory, index: int) -> TeacherSignals:
    """What lies on disk of a sample, by layer: (heads, n_queries, k), each layer cut to its longest row."""
    packed, n_queries = memory.packed(index), len(memory.sample(index).queries)
    logits = None if packed.logits is None else unpack(packed.logits)
    if packed.rows is None:
        return TeacherSignals({}, logits)
    sizes = [len(heads) * n_queries for heads in memory.selection.values()]
    parts = zip(memory.selection.items(), unpack(packed.rows).split(sizes), strict=True)
    return TeacherSignals({layer: _cut(part, len(heads), n_queries) for (layer, heads), part in parts}, logits)


def _cut(rows: SparseDistribution, n_heads: int, n_queries: int) -> SparseDistribution:
    k = max(1, int((rows.probabilities > 0).sum(dim=-1).max()))
    assert not torch.count_nonzero(rows.probabilities[:, k:])
    cut = SparseDistribution(rows.indices[:, :k], rows.probabilities[:, :k], rows.remaining)
    return cut.reshape(n_heads, n_queries)
