"""A replay batch: padded samples of several tasks with their teachers' rows and logits, ready for one forward.

Samples of different tasks have different selected heads (a selection is frozen with its task), so each layer gets
pairs of a sample and a head: what a batch holds and costs does not grow with the number of tasks that it mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.pairs import HeadPairs
from ..heads import HeadSelection
from ..sparse import SparseDistribution
from ..tasks.tokenize import IGNORED_LABEL
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
    rows: SparseDistribution
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
    logits: SparseDistribution | None

    def to(self, device: torch.device) -> ReplayBatch:
        """Move everything to ``device``."""
        return ReplayBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.queries.to(device),
            self.heads,
            {layer: teacher.to(device) for layer, teacher in self.layers.items()},
            None if self.logits is None else self.logits.to(device),
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
        [join_layers(signal.rows, selection) for signal, selection in zip(signals, selections, strict=True)],
        [signal.logits for signal in signals if signal.logits is not None],
        pad_token_id,
        torch.device("cpu"),
    )


def collate_flat(
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    rows: Sequence[SparseDistribution | None],
    logits: Sequence[SparseDistribution],
    pad_token_id: int,
    device: torch.device,
) -> ReplayBatch:
    """The same from rows as they are stored, (rows, k) by layer, then selected head, then query, and already on
    ``device``; None where a sample's selection is empty."""
    length = max(len(sample.input_ids) for sample in samples)
    n_queries = max(len(sample.queries) for sample in samples)
    heads = _union(selections)
    return ReplayBatch(
        _pad([sample.input_ids for sample in samples], length, pad_token_id).to(device),
        _pad([torch.ones_like(sample.input_ids) for sample in samples], length, 0).to(device),
        _pad([sample.labels for sample in samples], length, IGNORED_LABEL).to(device),
        _pad([sample.queries for sample in samples], n_queries, 0).to(device),
        heads,
        _layers(heads, samples, selections, rows, n_queries, device) if heads else {},
        SparseDistribution.join(logits) if len(logits) == len(samples) else None,
    )


class _Pair(NamedTuple):
    """A sample's selected head: its place among the tapped heads of its layer, the sample's number of queries, and the
    weight of each of these rows."""

    layer: int
    sample: int
    head: int
    slot: int
    n_queries: int
    weight: float


def _layers(
    heads: HeadSelection,
    samples: Sequence[ReplaySample],
    selections: Sequence[HeadSelection],
    rows: Sequence[SparseDistribution | None],
    n_queries: int,
    device: torch.device,
) -> dict[int, LayerTeacher]:
    """The rows of all pairs joined, put in order of their layers and cut there: as few calls as one layer takes."""
    stored = _pairs(heads, samples, selections)
    order = sorted(range(len(stored)), key=lambda place: stored[place].layer)
    pairs = [stored[place] for place in order]
    blocks = [
        found.reshape(-1, len(sample.queries)).pad(n_rows=n_queries)
        for sample, found in zip(samples, rows, strict=True)
        if found is not None
    ]
    joined = SparseDistribution.join(blocks)
    # Half of int64, which a layer's indices become while they are used.
    joined = replace(joined, indices=joined.indices.int()).pick(torch.tensor(order).to(device))
    real = torch.arange(n_queries) < torch.tensor([pair.n_queries for pair in pairs])[:, None]
    weights = torch.where(real, torch.tensor([pair.weight for pair in pairs])[:, None], 0).to(device)
    by_layer = _head_pairs(heads, pairs, len(samples), device)
    sizes = [len(own.heads) for own in by_layer.values()]
    cut = zip(by_layer.items(), joined.split(sizes), weights.split(sizes), strict=True)
    return {
        layer: LayerTeacher(own, teacher.reshape(1, -1, n_queries), weight[None])
        for (layer, own), teacher, weight in cut
    }


def _pairs(heads: HeadSelection, samples: Sequence[ReplaySample], selections: Sequence[HeadSelection]) -> list[_Pair]:
    """In the order of the stored rows: by sample, layer, head."""
    return [
        _Pair(
            layer,
            i,
            head,
            heads[layer].index(head),
            len(sample.queries),
            1 / (len(chosen) * len(sample.queries) * len(selection) * len(samples)),
        )
        for i, (sample, selection) in enumerate(zip(samples, selections, strict=True))
        for layer, chosen in selection.items()
        for head in chosen
    ]


def _head_pairs(
    heads: HeadSelection, pairs: Sequence[_Pair], n_samples: int, device: torch.device
) -> dict[int, HeadPairs]:
    """Of all layers, moved to ``device`` at once; ``pairs`` in order of their layers."""
    counts = {layer: [0] * n_samples for layer in heads}
    for pair in pairs:
        counts[pair.layer][pair.sample] += 1
    columns = [
        [pair.sample for pair in pairs],
        [pair.head for pair in pairs],
        [pair.slot for pair in pairs],
        [start for own in counts.values() for start in (0, *accumulate(own))],
    ]
    flat = torch.tensor([number for column in columns for number in column]).to(device)
    samples, own_heads, slots, starts = flat.split([len(column) for column in columns])
    sizes = [sum(own) for own in counts.values()]
    parts = zip(
        samples.split(sizes), own_heads.split(sizes), slots.split(sizes), starts.split(n_samples + 1), strict=True
    )
    return {layer: HeadPairs(*part, tuple(counts[layer])) for layer, part in zip(counts, parts, strict=True)}


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
