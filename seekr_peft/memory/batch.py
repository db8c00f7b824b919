"""A replay batch: padded samples of several tasks with their teachers' rows and logits, ready for one forward.

Samples of different tasks have different selected heads (a selection is frozen with its task), so each layer gets
the union of the batch's heads, and weights that are 0 where a sample did not select a head. May import ``storage``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.rows import TeacherRows
from ..heads import HeadSelection
from ..losses import IGNORED, TeacherDistributions
from .samples import ReplaySample
from .storage import TeacherSignals


@dataclass(frozen=True)
class LayerTeacher:
    """One layer's teacher rows (batch, heads, n_queries, k), indices int32, and the weight of each row, (batch, heads,
    n_queries).

    The weights of all layers sum to 1: mean over a sample's heads and queries, then over its layers, then over the
    samples of the batch, so that the weighted sum of the row KLs over all layers is the attention loss.
    """

    rows: TeacherRows
    weights: Tensor


@dataclass(frozen=True)
class ReplayBatch:
    """``input_ids``, ``attention_mask``, ``labels`` int64 (batch, T), right-padded; ``queries`` int64 (batch,
    n_queries); ``heads`` the union of the selections; ``logits`` in order of sample and position, or None."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    queries: Tensor
    heads: HeadSelection
    layers: dict[int, LayerTeacher]
    logits: TeacherDistributions | None

    def to(self, device: torch.device) -> ReplayBatch:
        """Move everything to ``device``."""
        layers = {
            layer: LayerTeacher(teacher.rows.to(device, torch.float32), teacher.weights.to(device))
            for layer, teacher in self.layers.items()
        }
        logits = self.logits
        if logits is not None:
            parts = (logits.indices, logits.probabilities, logits.remaining)
            logits = TeacherDistributions(*(part.to(device) for part in parts))
        return ReplayBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.queries.to(device),
            self.heads,
            layers,
            logits,
        )


def collate(
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    signals: Sequence[TeacherSignals],
    pad_token_id: int = 0,
) -> ReplayBatch:
    """Pad and join; ``selections[i]`` and ``signals[i]`` belong to ``samples[i]``."""
    length = max(len(sample.input_ids) for sample in samples)
    n_queries = max(len(sample.queries) for sample in samples)
    heads = _union(selections)
    layers = {layer: _layer(layer, heads, samples, selections, signals, n_queries) for layer in heads}
    logits = [signal.logits for signal in signals if signal.logits is not None]
    return ReplayBatch(
        _pad([sample.input_ids for sample in samples], length, pad_token_id),
        _pad([torch.ones_like(sample.input_ids) for sample in samples], length, 0),
        _pad([sample.labels for sample in samples], length, IGNORED),
        _pad([sample.queries for sample in samples], n_queries, 0),
        heads,
        layers,
        _join(logits) if len(logits) == len(samples) else None,
    )


def _layer(
    layer: int,
    heads: HeadSelection,
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    signals: Sequence[TeacherSignals],
    n_queries: int,
) -> LayerTeacher:
    union = heads[layer]
    k = max(signal.rows[layer].indices.shape[-1] for signal in signals if layer in signal.rows)
    shape = (len(samples), len(union), n_queries)
    # Half of int64, which a layer's indices become while they are used.
    indices = torch.zeros(*shape, k, dtype=torch.int32)
    probabilities, remaining, weights = torch.zeros(*shape, k), torch.zeros(shape), torch.zeros(shape)
    for i, (sample, selection, signal) in enumerate(zip(samples, selections, signals, strict=True)):
        if layer not in signal.rows:
            continue
        row, count = signal.rows[layer], len(sample.queries)
        places = torch.tensor([union.index(head) for head in selection[layer]])
        indices[i, places, :count, : row.indices.shape[-1]] = row.indices.int()
        probabilities[i, places, :count, : row.indices.shape[-1]] = row.probabilities
        remaining[i, places, :count] = row.remaining
        weights[i, places, :count] = 1 / (len(places) * count * len(selection) * len(samples))
    return LayerTeacher(TeacherRows(indices, probabilities, remaining), weights)


def _union(selections: Sequence[HeadSelection]) -> HeadSelection:
    heads: dict[int, set[int]] = {}
    for selection in selections:
        for layer, indices in selection.items():
            heads.setdefault(layer, set()).update(indices)
    return HeadSelection({layer: sorted(indices) for layer, indices in heads.items()})


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    batch = torch.full((len(rows), length), value)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return batch


def _join(parts: list[TeacherDistributions]) -> TeacherDistributions:
    k = max(part.indices.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return TeacherDistributions(
        torch.cat([pad(part.indices, (0, k - part.indices.shape[-1])) for part in parts]),
        torch.cat([pad(part.probabilities, (0, k - part.probabilities.shape[-1])) for part in parts]),
        torch.cat([part.remaining for part in parts]),
    )
