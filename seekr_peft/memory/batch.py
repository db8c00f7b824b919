"""A replay batch: padded samples of several tasks with their teachers' rows and logits, ready for one forward.

Samples of different tasks have different selected heads (a selection is frozen with its task), so each layer gets
pairs of a sample and a head: what a batch holds and costs does not grow with the number of tasks that it mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..attention.row_math import HeadPairs, TeacherRows
from ..heads import HeadSelection
from ..losses import IGNORED, TeacherDistributions
from .codec import SparseRows
from .samples import ReplaySample
from .storage import TeacherSignals, join_layers


@dataclass(frozen=True)
class LayerTeacher:
    """One layer's ``pairs`` of a sample and one of its heads, their teacher rows (1, n_pairs, n_queries, k), indices
    int32, and the weight of each row, (1, n_pairs, n_queries).

    The weights of all layers sum to 1: mean over a sample's heads and queries, then over its layers, then over the
    samples of the batch, so that the weighted sum of the row KLs over all layers is the attention loss.
    """

    pairs: HeadPairs
    rows: TeacherRows
    weights: Tensor

    def to(self, device: torch.device) -> LayerTeacher:
        """Move everything to ``device``."""
        return LayerTeacher(self.pairs.to(device), self.rows.to(device, torch.float32), self.weights.to(device))


@dataclass(frozen=True)
class ReplayBatch:
    """``input_ids``, ``attention_mask``, ``labels`` int64 (batch, T), right-padded; ``queries`` int64 (batch,
    n_queries); ``heads`` all that some sample selected; ``logits`` in order of sample and position, or None."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    queries: Tensor
    heads: HeadSelection
    layers: dict[int, LayerTeacher]
    logits: TeacherDistributions | None

    def to(self, device: torch.device) -> ReplayBatch:
        """Move everything to ``device``."""
        layers = {layer: teacher.to(device) for layer, teacher in self.layers.items()}
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
    return collate_flat(
        samples,
        selections,
        [
            join_layers(signal.rows, selection) if selection else None
            for signal, selection in zip(signals, selections, strict=True)
        ],
        [signal.logits for signal in signals if signal.logits is not None],
        pad_token_id,
        torch.device("cpu"),
    )


def collate_flat(
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    rows: Sequence[SparseRows | None],
    logits: Sequence[TeacherDistributions],
    pad_token_id: int,
    device: torch.device,
) -> ReplayBatch:
    """The same from rows as they are stored, by layer, then selected head, then query, and already on ``device``."""
    length = max(len(sample.input_ids) for sample in samples)
    n_queries = max(len(sample.queries) for sample in samples)
    heads = _union(selections)
    return ReplayBatch(
        _pad([sample.input_ids for sample in samples], length, pad_token_id).to(device),
        _pad([torch.ones_like(sample.input_ids) for sample in samples], length, 0).to(device),
        _pad([sample.labels for sample in samples], length, IGNORED).to(device),
        _pad([sample.queries for sample in samples], n_queries, 0).to(device),
        heads,
        _layers(heads, samples, selections, rows, n_queries, device) if heads else {},
        _join(logits) if len(logits) == len(samples) else None,
    )


def _layers(
    heads: HeadSelection,
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    rows: Sequence[SparseRows | None],
    n_queries: int,
    device: torch.device,
) -> dict[int, LayerTeacher]:
    """Each layer's block of arrays over all layers, which take as many calls to fill as one layer's would."""
    k = max(found.indices.shape[-1] for found in rows if found is not None)
    pairs = {
        layer: [(i, head) for i, chosen in enumerate(selections) for head in chosen.get(layer, ())] for layer in heads
    }
    places = {pair: place for place, pair in enumerate((layer, *pair) for layer in heads for pair in pairs[layer])}
    n_rows = len(places) * n_queries
    # Half of int64, which a layer's indices become while they are used.
    indices = torch.zeros(n_rows, k, dtype=torch.int32, device=device)
    probabilities = torch.zeros(n_rows, k, device=device)
    remaining, weights = torch.zeros(n_rows, device=device), torch.zeros(n_rows, device=device)
    for i, (sample, selection, found) in enumerate(zip(samples, selections, rows, strict=True)):
        if found is None:
            continue
        count = len(sample.queries)
        first_rows, shares = [], []
        for layer, chosen in selection.items():
            first_rows += [n_queries * places[layer, i, head] for head in chosen]
            shares += [1 / (len(chosen) * count * len(selection) * len(samples))] * len(chosen)
        target = torch.tensor(first_rows)[:, None] + torch.arange(count)
        target = target.flatten().to(device)
        width = found.indices.shape[-1]
        indices[target, :width] = found.indices.int()
        probabilities[target, :width] = found.probabilities
        remaining[target] = found.remaining
        weights[target] = torch.tensor(shares).repeat_interleave(count).to(device)
    layers, start = {}, 0
    for layer, own in _pairs(heads, pairs, len(samples), device).items():
        shape = (1, len(pairs[layer]), n_queries)
        block = slice(start, start + len(pairs[layer]) * n_queries)
        start = block.stop
        stored = indices[block].view(*shape, k), probabilities[block].view(*shape, k), remaining[block].view(shape)
        layers[layer] = LayerTeacher(own, TeacherRows(*stored), weights[block].view(shape))
    return layers


def _pairs(
    heads: HeadSelection, pairs: dict[int, list[tuple[int, int]]], n_samples: int, device: torch.device
) -> dict[int, HeadPairs]:
    """Of all layers, moved to ``device`` at once."""
    counts = {layer: [sum(i == sample for sample, _ in pairs[layer]) for i in range(n_samples)] for layer in heads}
    numbers = [
        (
            [sample for sample, _ in pairs[layer]],
            [head for _, head in pairs[layer]],
            [heads[layer].index(head) for _, head in pairs[layer]],
            [0, *accumulate(counts[layer])],
        )
        for layer in heads
    ]
    flat = torch.tensor([number for layer in numbers for part in layer for number in part]).to(device)
    parts = iter(flat.split([len(part) for layer in numbers for part in layer]))
    return {
        layer: HeadPairs(next(parts), next(parts), next(parts), next(parts), tuple(counts[layer])) for layer in heads
    }


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


def _join(parts: Sequence[TeacherDistributions]) -> TeacherDistributions:
    k = max(part.indices.shape[-1] for part in parts)
    pad = torch.nn.functional.pad
    return TeacherDistributions(
        torch.cat([pad(part.indices, (0, k - part.indices.shape[-1])) for part in parts]),
        torch.cat([pad(part.probabilities, (0, k - part.probabilities.shape[-1])) for part in parts]),
        torch.cat([part.remaining for part in parts]),
    )
