"""One attention call as an observer sees it: rows, row KL and gradient norms, whatever the kernel.

``InterfaceCall`` comes through transformers' attention interface (sdpa, flash, flex): it has q, k, v and recomputes
only the selected rows. ``EagerCall`` comes from a forward hook and reads the weights that an eager kernel returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import CaptureError
from ..sparse import SparseDistribution, compute_dtype
from . import triton_launch as fused
from .gradient_norms import gradient_squares, gradient_squares_causal, gradient_squares_full
from .masks import RowMask
from .models import flex_allowed
from .pairs import HeadPairs, PairMask, head_keys, head_queries
from .row_divergence import kl_of_rows, row_kl
from .rows import RowInputs, normalised, row_probabilities

KINDS_OF_MASK = 2
"""Masks that the layers of a model share at most: a full and a sliding one."""


@dataclass(frozen=True)
class QuerySelection:
    """Query positions of a forward: ``positions`` int64 (batch, n_queries), ``real`` bool of the same shape, False
    where the position holds padding; ``every`` when these are all the positions in order. ``masks`` of the last
    ``KINDS_OF_MASK`` kinds, which most layers share."""

    positions: Tensor
    real: Tensor
    every: bool
    masks: dict[tuple[object, ...], tuple[object, RowMask]] = field(default_factory=dict, repr=False, compare=False)


class AttentionCall(Protocol):
    """What an observer may ask of one layer's attention call. ``heads`` is int64 (n_selected,).

    ``rows`` and ``gradient_squares`` are of all ``heads`` of all samples; ``pair_kl`` is of ``pairs``, since samples
    have heads of their own, with a teacher (1, n_pairs, n_queries, k) and weights (1, n_pairs, n_queries). So what a
    batch costs does not grow with the number of tasks that it mixes.
    """

    def rows(self) -> Tensor: ...

    def pair_kl(self, pairs: HeadPairs, teacher: SparseDistribution, weights: Tensor) -> Tensor: ...

    def gradient_squares(self, gradient: Tensor, every_query: bool) -> Tensor: ...


@dataclass
class InterfaceCall:
    """q (batch, n_heads, T_q, d), k and v (batch, n_kv_heads, T_k, d), and the mask as the kernel got it."""

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: object
    position_bias: Tensor | None
    scaling: float
    causal: bool
    sliding_window: int | None
    heads: Tensor
    queries: QuerySelection

    @cached_property
    def inputs(self) -> RowInputs:
        """The selected rows' ingredients."""
        n_heads = self.query.shape[1]
        if self.queries.every:
            query = self.query.index_select(1, self.heads) if self.heads.numel() < n_heads else self.query
        else:
            query = head_queries(self.query, self.heads, self.queries.positions)
        key = head_keys(self.key, self.heads, n_heads)
        return RowInputs(query, key, self._mask(self.queries), self.queries.real, self.scaling)

    def rows(self) -> Tensor:
        return row_probabilities(self.inputs)

    def pair_kl(self, pairs: HeadPairs, teacher: SparseDistribution, weights: Tensor) -> Tensor:
        if self._runs_fused(len(pairs.heads)):
            return fused.row_kl(self._fused(pairs), teacher, weights)
        return row_kl(self.pair_inputs(pairs), teacher, weights)

    def pair_inputs(self, pairs: HeadPairs) -> RowInputs:
        """The ingredients of the rows of ``pairs``, as the heads of a single sample."""
        query = pairs.queries(self.query, self.queries.positions)
        key = pairs.keys(self.key, self.query.shape[1])
        # The weights say which rows count.
        real = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool)
        return RowInputs(query, key, PairMask(self._mask(self.queries), pairs), real, self.scaling)

    def _runs_fused(self, n_pairs: int) -> bool:
        return fused.suits(self.query, self.key, n_pairs, self.queries.positions.shape[1])

    def _fused(self, pairs: HeadPairs) -> fused.FusedInputs:
        mask, positions = self._mask(self.queries), self.queries.positions
        return fused.FusedInputs(self.query, self.key, pairs, positions, mask, self.scaling)

    def gradient_squares(self, gradient: Tensor, every_query: bool) -> Tensor:
        """(batch, n_selected) sums of squares of dL/dA, from the gradient of the kernel's output, (batch, T_q, n_heads,
        d_v)."""
        gradient, queries = gradient.transpose(1, 2), self.queries
        value = head_keys(self.value, self.heads, self.query.shape[1])
        if every_query:
            gradient = gradient.index_select(1, self.heads)
            if self.attention_mask is None and self.sliding_window is None:
                if not self.causal:
                    return gradient_squares_full(gradient, value)
                if self.query.shape[2] == self.key.shape[2]:
                    return gradient_squares_causal(gradient, value)
            queries = every_position(self.query, None)
        else:
            gradient = head_queries(gradient, self.heads, queries.positions)
        gradient = gradient * queries.real[:, None, :, None]
        return gradient_squares(gradient, value, self._mask(queries).allowed)

    def watched(self, output: Tensor, every_query: bool, anchor: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        """The kernel's ``output`` (batch, T_q, n_heads, d_v) as it is; ``take`` gets its ``gradient_squares`` as soon
        as its gradient arrives. It also hangs on ``anchor``, whose gradient is 0."""
        # The masks need the shapes and the device of q and k alone, and a bias allows and forbids nothing.
        bare = replace(
            self, query=_hollow(self.query), key=_hollow(self.key), value=_hollow(self.value), position_bias=None
        )
        watched: Tensor = Watched.apply(
            output,
            anchor,
            self.value.detach(),
            lambda gradient, value: take(replace(bare, value=value).gradient_squares(gradient, every_query)),
        )
        return watched

    def _mask(self, queries: QuerySelection) -> RowMask:
        """The mask of ``queries``, made once for all the layers that were given the same."""
        given = self.attention_mask
        if self.position_bias is not None or (isinstance(given, Tensor) and given.dim() == 4 and given.shape[1] > 1):
            return self._make_mask(queries)
        key = (id(given), self.query.shape[2], self.key.shape[2], self.causal, self.sliding_window)
        if key not in queries.masks:
            if len(queries.masks) == KINDS_OF_MASK:
                # A model that gives each layer a mask of its own.
                del queries.masks[next(iter(queries.masks))]
            # Kept beside it, the given mask cannot pass its id on to another.
            queries.masks[key] = (given, self._make_mask(queries))
        return queries.masks[key][1]

    def _make_mask(self, queries: QuerySelection) -> RowMask:
        """Where the selected rows may look and the bias, from whatever mask the kernel was given."""
        n_keys = self.key.shape[2]
        mask, bias = self.attention_mask, None
        if self.position_bias is not None:
            bias = _select(self.position_bias, queries, self.heads)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            allowed = self._positional(queries, n_keys)
            if isinstance(mask, Tensor):  # flash attention keeps the 2D padding mask
                allowed = allowed & mask[:, None, None, -n_keys:].bool()
        elif isinstance(mask, Tensor):
            selected = _select(mask, queries, self.heads)[..., :n_keys]
            if mask.dtype == torch.bool:
                allowed = selected
            else:
                allowed = selected > torch.finfo(selected.dtype).min
                bias = selected if bias is None else bias + selected
        elif hasattr(mask, "mask_mod"):
            allowed = flex_allowed(mask, queries.positions, self.query.shape[1], n_keys)
        else:
            raise CaptureError(
                f"cannot read an attention mask of type {type(mask).__name__}; load the model with "
                f"attn_implementation='sdpa' or 'eager'."
            )
        return RowMask(allowed, bias)

    def _positional(self, queries: QuerySelection, n_keys: int) -> Tensor:
        keys = torch.arange(n_keys, device=self.query.device)
        # With a key-value cache the first query stands behind the cached keys.
        positions = queries.positions[:, None, :, None] + (n_keys - self.query.shape[2])
        allowed = torch.ones_like(positions, dtype=torch.bool).expand(-1, -1, -1, n_keys)
        if self.causal:
            allowed = allowed & (keys <= positions)
        if self.sliding_window is not None:
            # Without causality the window reaches as far to the right as to the left.
            allowed = allowed & ((keys - positions).abs() < self.sliding_window)
        return allowed


@dataclass
class EagerCall:
    """The weights (batch, n_heads, T_q, T_k) that an eager kernel returned, after softmax."""

    weights: Tensor
    heads: Tensor
    queries: QuerySelection

    def rows(self) -> Tensor:
        rows = _select(self.weights, self.queries, self.heads)
        return torch.where(self.queries.real[:, None, :, None], rows.to(compute_dtype(rows)), 0)

    def pair_kl(self, pairs: HeadPairs, teacher: SparseDistribution, weights: Tensor) -> Tensor:
        rows = pairs.queries(self.weights, self.queries.positions)
        return kl_of_rows(normalised(rows.to(compute_dtype(rows))), teacher, weights)

    def gradient_squares(self, gradient: Tensor, every_query: bool) -> Tensor:
        """(batch, n_selected) sums of squares of the gradient at the weights that may be non-zero."""
        gradient = torch.where(self.weights > 0, gradient, 0).index_select(1, self.heads)
        if not every_query:
            positions = self.queries.positions[:, None, :, None]
            gradient = gradient.gather(2, positions.expand(-1, gradient.shape[1], -1, gradient.shape[3]))
            gradient = gradient * self.queries.real[:, None, :, None]
        return gradient.to(compute_dtype(gradient)).square().sum(dim=(-1, -2))


class Watched(torch.autograd.Function):
    """Its input as it is, whose gradient passes through and is shown to ``see`` beside the layer's v.

    What autograd saves, it frees once it was used, and activation checkpointing does not keep it but computes it again:
    so v is no more in memory than what the layer's own backward needs.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, value: Tensor, see: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(value)
        ctx.anchor, ctx.see = anchor.detach(), see
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.see(gradients[0], *ctx.saved_tensors)
        return gradients[0], torch.zeros_like(ctx.anchor), None, None


def _hollow(tensor: Tensor) -> Tensor:
    """Shape, dtype and device of ``tensor`` without its memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def every_position(query: Tensor, real: Tensor | None) -> QuerySelection:
    """All query positions of ``query`` (batch, heads, T_q, d)."""
    batch, _, length, _ = query.shape
    positions = torch.arange(length, device=query.device).expand(batch, length)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    return QuerySelection(positions, real, every=True)


def _select(tensor: Tensor, queries: QuerySelection, heads: Tensor) -> Tensor:
    """Rows and heads of a (batch | 1, heads | 1, T_q | 1, T_k) tensor."""
    if tensor.shape[1] > 1:
        tensor = tensor.index_select(1, heads)
    if tensor.shape[2] == 1 or queries.every:
        return tensor
    tensor = tensor.expand(queries.positions.shape[0], -1, -1, -1)
    positions = queries.positions[:, None, :, None]
    return tensor.gather(2, positions.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
