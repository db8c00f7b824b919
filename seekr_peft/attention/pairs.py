"""Heads and samples: which heads' queries and keys are taken, also where samples have heads of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import RowMask


@dataclass(frozen=True)
class HeadPairs:
    """Which heads of which samples a layer's rows belong to, where samples have heads of their own.

    Pair i is head ``heads[i]`` of sample ``samples[i]``, which is number ``slots[i]`` of the layer's tapped heads;
    int64 (n_pairs,), in order of the samples. ``counts`` are each sample's pairs, and ``starts`` int64 (batch + 1,) the
    first pair of each and the end.
    """

    samples: Tensor
    heads: Tensor
    slots: Tensor
    starts: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of_all(cls, heads: Tensor, batch: int) -> HeadPairs:
        """The same ``heads`` (n_selected,), which are the tapped ones, of each of ``batch`` samples."""
        count, device = heads.numel(), heads.device
        return cls(
            torch.arange(batch, device=device).repeat_interleave(count),
            heads.repeat(batch),
            torch.arange(count, device=device).repeat(batch),
            torch.arange(0, batch * count + 1, count, device=device),
            (count,) * batch,
        )

    def to(self, device: torch.device) -> HeadPairs:
        """Move."""
        parts = self.samples.to(device), self.heads.to(device), self.slots.to(device), self.starts.to(device)
        return HeadPairs(*parts, self.counts)

    def queries(self, query: Tensor, positions: Tensor) -> Tensor:
        """Rows (1, n_pairs, n_queries, n) of ``query`` (batch, n_heads, T, n) at each sample's ``positions`` (batch,
        n_queries)."""
        samples = self.samples[:, None]
        return query[samples, self.heads[:, None], positions[self.samples]][None]

    def keys(self, key: Tensor, n_heads: int) -> Tensor:
        """Keys (1, n_pairs, T, d), of ``key`` (batch, n_kv_heads, T, d) under grouped-query attention."""
        if key.shape[0] == 1:
            return head_keys(key, self.heads, n_heads)
        # Sample by sample: one index over samples and heads takes four times as long on a CPU, and its backward twice.
        parts = zip(key.unbind(0), self.heads.split(list(self.counts)), strict=True)
        return torch.cat([head_keys(one[None], heads, n_heads) for one, heads in parts if heads.numel()], dim=1)


@dataclass(frozen=True)
class PairMask:
    """``mask`` (of batch and tapped heads) as that of ``pairs``, one head behind the other of a single sample."""

    mask: RowMask
    pairs: HeadPairs

    @property
    def allowed(self) -> Tensor:
        """bool, broadcastable to (1, n_pairs, n_queries, n_keys)."""
        return self._picked(self.mask.allowed)

    @property
    def bias(self) -> Tensor | None:
        """Of the whole mask."""
        return self.mask.bias

    @property
    def sees_a_key(self) -> Tensor:
        """bool (1, n_pairs, n_queries | 1)."""
        return self._picked(self.mask.sees_a_key)

    def addend_of(self, part: slice) -> Tensor:
        """As ``RowMask.addend_of``; (1, n_pairs, rows, n_keys)."""
        return self._picked(self.mask.addend_of(part))

    def _picked(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] == tensor.shape[1] == 1:
            return tensor
        samples = self.pairs.samples if tensor.shape[0] > 1 else 0
        return tensor[samples, self.pairs.slots if tensor.shape[1] > 1 else 0][None]


def head_queries(query: Tensor, heads: Tensor, positions: Tensor) -> Tensor:
    """Queries (batch, len(heads), n_queries, d) of the given heads at ``positions`` (batch, n_queries)."""
    batch = torch.arange(query.shape[0], device=query.device)
    return query[batch[:, None, None], heads[None, :, None], positions[:, None, :]]


def head_keys(key: Tensor, heads: Tensor, n_heads: int) -> Tensor:
    """Keys (or values) of the given query heads, (batch, len(heads), T, d), under grouped-query attention."""
    if heads.numel() == n_heads == key.shape[1]:
        return key
    # As models lay keys out, head behind head for each position; across that, index_select copies all heads first.
    return key.transpose(1, 2).index_select(2, heads // (n_heads // key.shape[1])).transpose(1, 2)
