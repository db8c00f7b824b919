"""Attention rows of selected heads and queries: softmax, row KL with a hand-written gradient, and gradient norms.

Pure tensor code; knows no model. Never builds an array of heads x T x T: everything is at most
heads x queries x T, and longer query lists are walked in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Result = TypeVar("Result")

CHUNK_BYTES = 32 * 2**20
"""Upper limit of one chunk of row logits, in bytes; a longer list of queries is split."""

BROADEST = 4
"""One stored row's entries at most, as a multiple of the average: a replay batch pads all rows to its broadest."""


@dataclass(frozen=True)
class RowMask:
    """Where the selected queries may look; most models have the same for every layer and head.

    ``allowed`` bool, broadcastable to (batch, heads, n_queries, n_keys), True where the query may look; ``bias`` None
    or a float of the same form that is added to the row logits.
    """

    allowed: Tensor
    bias: Tensor | None = None

    @cached_property
    def sees_a_key(self) -> Tensor:
        """bool, broadcastable to (batch, heads, n_queries): the row may look at some key."""
        return self.allowed.any(dim=-1)

    @cached_property
    def addend(self) -> Tensor:
        """What turns logits into masked logits: the bias, minus infinity where the query may not look. A row that may
        look nowhere gets zeros, so that its softmax is no NaN. Adding takes a quarter of the time of ``masked_fill_``
        (T = 1024, measured on CPU)."""
        blocked = ~self.allowed & self.sees_a_key[..., None]
        if self.bias is None:
            return torch.zeros(blocked.shape, device=blocked.device).masked_fill_(blocked, float("-inf"))
        bias = torch.where(self.sees_a_key[..., None], self.bias, 0).to(compute_dtype(self.bias))
        return bias.masked_fill(blocked, float("-inf"))

    def addend_of(self, part: slice) -> Tensor:
        """``addend`` of the query rows ``part``; an axis of 1 is the same for all of them."""
        return _rows(self.addend, part)


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


@dataclass(frozen=True)
class RowInputs:
    """What one layer's selected attention rows are computed from.

    Shapes: ``query`` (batch, heads, n_queries, head_dim) and ``key`` (batch, heads, n_keys, head_dim), in the model's
    dtype and after rotary embedding and q/k norms; ``mask`` of these rows; ``real`` bool (batch, n_queries), False
    where the query is padding. ``scaling`` multiplies q k^T.
    """

    query: Tensor
    key: Tensor
    mask: RowMask | PairMask
    real: Tensor
    scaling: float


@dataclass(frozen=True)
class TeacherRows:
    """Teacher attention rows as their largest entries and one remaining mass.

    Shapes: ``indices`` int64 or int32 and ``probabilities`` float (batch, heads, n_queries, k); ``remaining`` float
    (batch, heads, n_queries), the mass of all other keys. Entries of probability 0 count as absent.
    """

    indices: Tensor
    probabilities: Tensor
    remaining: Tensor

    @classmethod
    def from_dense(cls, rows: Tensor, top_k: int | None = None, kept_mass: float = 1.0) -> TeacherRows:
        """Keep the ``top_k`` largest entries of ``rows`` (..., n_keys), or as few as hold a share ``kept_mass`` of the
        row; exact when ``top_k`` covers every key and ``kept_mass`` is 1."""
        n_keys = rows.shape[-1]
        if kept_mass >= 1 and (top_k is None or top_k >= n_keys):
            indices = torch.arange(n_keys, device=rows.device).expand(rows.shape)
            return cls(indices, rows, torch.zeros_like(rows[..., 0]))
        kept = cls._largest(rows, top_k or n_keys)
        return kept if kept_mass >= 1 else kept._up_to(kept_mass)

    @classmethod
    def _largest(cls, rows: Tensor, top_k: int) -> TeacherRows:
        """The ``top_k`` largest entries, the largest first."""
        probabilities, indices = rows.topk(min(top_k, rows.shape[-1]), dim=-1)
        # Summed directly: the difference of two sums near 1 would leave rounding where nothing remains.
        return cls(indices, probabilities, rows.scatter(-1, indices, 0).sum(dim=-1))

    def _up_to(self, kept_mass: float) -> TeacherRows:
        """Of entries in falling order as few as hold ``kept_mass``."""
        return self._without(self.probabilities.cumsum(dim=-1) - self.probabilities >= kept_mass)

    def _without(self, dropped: Tensor) -> TeacherRows:
        """The ``dropped`` entries join the remaining mass."""
        moved = torch.where(dropped, self.probabilities, 0)
        return replace(
            self,
            probabilities=torch.where(dropped, 0, self.probabilities),
            remaining=self.remaining + moved.sum(dim=-1),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> TeacherRows:
        """Move; the indices keep their type."""
        return TeacherRows(
            self.indices.to(device), self.probabilities.to(device, dtype), self.remaining.to(device, dtype)
        )


def sparse_rows(layers: dict[int, Tensor], per_row: int, kept_mass: float = 1.0) -> dict[int, TeacherRows]:
    """Rows (..., n_keys) by layer as the fewest entries that hold ``kept_mass`` of each; where those are more than
    ``per_row`` on average over all rows, as the ``per_row`` that tell most of them, whatever mass they hold.

    A single row has at most ``BROADEST`` times as many. Exact when ``per_row`` covers every key.
    """
    if all(per_row >= rows.shape[-1] for rows in layers.values()):
        return {layer: TeacherRows.from_dense(rows) for layer, rows in layers.items()}
    broad = {layer: TeacherRows._largest(rows, BROADEST * per_row) for layer, rows in layers.items()}
    kept = broad if kept_mass >= 1 else {layer: rows._up_to(kept_mass) for layer, rows in broad.items()}
    n_kept = per_row * sum(rows.remaining.numel() for rows in kept.values())
    if sum(int((rows.probabilities > 0).sum()) for rows in kept.values()) <= n_kept:
        return kept
    gains = {layer: _gains(rows, (layers[layer] > 0).sum(dim=-1)) for layer, rows in broad.items()}
    # Stable, so that of equal gains a row's larger entry comes first and what is kept of a row are its largest.
    order = torch.cat([part.flatten() for part in gains.values()]).sort(descending=True, stable=True).indices
    dropped = torch.ones(order.shape, dtype=torch.bool, device=order.device)
    dropped[order[:n_kept]] = False
    parts = dropped.split([part.numel() for part in gains.values()])
    return {
        layer: rows._without(part.view_as(rows.probabilities))
        for (layer, rows), part in zip(broad.items(), parts, strict=True)
    }


def _gains(rows: TeacherRows, n_keys: Tensor) -> Tensor:
    """How much less a row loses with each of its entries, the largest first.

    A row that leaves a mass M to n keys loses M, about which the distance to a student says nothing, and
    KL(exact || stored, M spread evenly), which is the sum over those keys of p log p, less M log(M / n). (At 32 entries
    on running text: a KL lower by 12 to 16 % than with the largest entries of all rows, a mass left over larger by 2
    to 4 %.) A gain is no larger than that of the entry before, without which it cannot be had.

    Args:
        n_keys: int64 (batch, heads, n_queries), how many keys of each row have any mass.

    Returns:
        As ``rows.probabilities``; minus infinity for absent entries.
    """
    probabilities, rest = rows.probabilities, rows.remaining[..., None]
    masses = torch.cat([probabilities.flip(-1).cumsum(dim=-1).flip(-1) + rest, rest], dim=-1)
    n_left = n_keys[..., None] - torch.arange(masses.shape[-1], device=masses.device)
    spread = torch.special.xlogy(masses, masses) - masses * n_left.clamp_min(1).to(masses).log()
    gains = probabilities + torch.special.xlogy(probabilities, probabilities) + spread.diff(dim=-1)
    return torch.where(probabilities > 0, gains, float("-inf")).cummin(dim=-1).values


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32 (bfloat16 has too few digits for a sum over keys)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def outside_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run ``function`` (its first argument a tensor or ``RowInputs``) without autocast, which would round its float32
    products to half precision."""

    @wraps(function)
    def run(first: Tensor | RowInputs, *rest: Any, **options: Any) -> Result:
        kind = (first.query if isinstance(first, RowInputs) else first).device.type
        # The meta device has none.
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return function(first, *rest, **options)

    return run


def normalised(rows: Tensor) -> Tensor:
    """``rows`` (..., n_keys) divided by their sum; rows of zeros stay zero.

    The weights of a model with attention sinks (gpt-oss) sum to less than 1: what is left is a distribution over keys.
    """
    return rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


@outside_autocast
def row_probabilities(inputs: RowInputs) -> Tensor:
    """Softmax rows (batch, heads, n_queries, n_keys), float32 (float64 for float64 input), differentiable.

    Each row sums to 1; rows whose query is padding are exactly 0.
    """
    rows = torch.softmax(_logits(inputs, slice(None)), dim=-1)
    return torch.where(inputs.real[:, None, :, None] & inputs.mask.allowed, rows, 0)


def row_weights(real: Tensor, n_heads: int) -> Tensor:
    """Weights (batch, n_heads, n_queries) of a mean over heads and queries per sample, then over samples.

    Padding weighs 0. The released code averages rows per sample and then samples; with samples of different length
    this differs from pooling all rows.
    """
    counts = real.sum(dim=1, keepdim=True).clamp_min(1)
    weights = real / counts / (real.shape[0] * n_heads)
    return weights[:, None, :].expand(-1, n_heads, -1)


@outside_autocast
def row_kl(inputs: RowInputs, teacher: TeacherRows, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of KL(teacher row || student row); scalar in nats, float32 (float64 for float64 input).

    With a remaining mass r the KL is taken over the partition {each stored key} + {all others}, which is a lower
    bound of the full KL and equal to it when the stored keys cover the row. For row logits s the gradient is
    softmax(s) * sum(p) - p, where r is spread over the other keys in proportion to the student. It is made along with
    the value, so that a row is computed once and what waits for the backward is as small as q and k.

    Args:
        inputs: The student's rows.
        teacher: The teacher's rows for the same heads, queries and keys; treated as constants.
        weights: (batch, heads, n_queries), 0 for rows that do not count; None uses ``row_weights``. A row that may
            look at no key never counts, and what a row that does not count holds (even NaN) has no influence.
    """
    if weights is None:
        weights = row_weights(inputs.real, inputs.query.shape[1])
    dtype = compute_dtype(inputs.query)
    teacher = teacher.to(inputs.query.device, dtype)
    weights = weights.to(inputs.query.device, dtype)
    counts = (weights > 0) & inputs.mask.sees_a_key
    # 0 * NaN is NaN: what a row without weight holds would reach the sum, and through q k^T the gradient of every key.
    weights = torch.where(counts, weights, 0)
    query = torch.where(counts[..., None], inputs.query, 0)
    teacher = TeacherRows(
        teacher.indices.long(),
        torch.where(counts[..., None], teacher.probabilities, 0),
        torch.where(counts, teacher.remaining, 0),
    )
    return _RowKL.apply(query, inputs.key, inputs, teacher, weights, torch.is_grad_enabled())


def kl_of_rows(rows: Tensor, teacher: TeacherRows, weights: Tensor) -> Tensor:
    """The same loss from materialised student rows (batch, heads, n_queries, n_keys), by plain autograd.

    For models whose kernel returns the weights (eager); ``row_kl`` is tested against it.
    """
    teacher = teacher.to(rows.device, compute_dtype(rows))
    indices, weights = teacher.indices.long(), weights.to(rows.device)
    # The outer where() below guards the value; this one guards the gradient against 0 * NaN.
    rows = torch.where((weights > 0)[..., None], rows, 0)
    tiny = torch.finfo(rows.dtype).tiny
    kept = rows.gather(-1, indices)
    others = _others(rows, indices, teacher.probabilities).sum(dim=-1).clamp_min(tiny)
    stored = torch.special.xlogy(teacher.probabilities, teacher.probabilities)
    cross = torch.where(teacher.probabilities > 0, teacher.probabilities * kept.clamp_min(tiny).log(), 0)
    rest = torch.special.xlogy(teacher.remaining, teacher.remaining) - torch.where(
        teacher.remaining > 0, teacher.remaining * others.log(), 0
    )
    per_row = (stored - cross).sum(dim=-1) + rest
    return (torch.where(weights > 0, per_row, 0) * weights.to(per_row)).sum()


@outside_autocast
def gradient_squares(output_gradient: Tensor, value: Tensor, allowed: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Per head, the sum over the given rows and their allowed keys of (dL/dA)^2, where dL/dA = dO V^T.

    Args:
        output_gradient: (batch, heads, n_queries, head_dim), gradient of the loss at the attention output of the
            wanted queries.
        value: (batch, kv_heads, n_keys, head_dim); each is shared by heads / kv_heads query heads.
        allowed: bool, broadcastable to (batch, heads, n_queries, n_keys).

    Returns:
        (batch, heads), float32 or float64.
    """
    dtype = compute_dtype(output_gradient)
    value = _per_head(value, output_gradient.shape[1]).to(dtype)
    total = output_gradient.new_zeros(output_gradient.shape[:2], dtype=dtype)
    n_queries = output_gradient.shape[2]
    for part in _chunks(n_queries, total.numel() * value.shape[2] * value.element_size(), chunk_bytes):
        gradient = output_gradient[:, :, part].to(dtype) @ value.transpose(-1, -2)
        total += torch.where(_rows(allowed, part), gradient, 0).square().sum(dim=(-1, -2))
    return total


@outside_autocast
def gradient_squares_causal(output_gradient: Tensor, value: Tensor, block: int = 64) -> Tensor:
    """``gradient_squares`` over all T causal rows in O(T d^2) by prefix Gram matrices, exactly.

    Row q sees the keys up to q, so its sum of squares is dO_q^T G_q dO_q with G_q = sum over k <= q of V_k V_k^T.
    G is carried from block to block; only the triangle inside a block is multiplied out (block x block numbers).

    Args:
        output_gradient: (batch, heads, T, head_dim).
        value: (batch, kv_heads, T, head_dim).
    """
    dtype = compute_dtype(output_gradient)
    value = _per_head(value, output_gradient.shape[1]).to(dtype)
    total = output_gradient.new_zeros(output_gradient.shape[:2], dtype=dtype)
    gram = value.new_zeros(*value.shape[:2], value.shape[-1], value.shape[-1])
    for start in range(0, output_gradient.shape[2], block):
        part = slice(start, start + block)
        gradient, values = output_gradient[:, :, part].to(dtype), value[:, :, part]
        inside = torch.tril(gradient @ values.transpose(-1, -2))
        before = ((gradient @ gram) * gradient).sum(dim=(-1, -2))
        total += before + inside.square().sum(dim=(-1, -2))
        gram = gram + values.transpose(-1, -2) @ values
    return total


@outside_autocast
def gradient_squares_full(output_gradient: Tensor, value: Tensor) -> Tensor:
    """``gradient_squares`` over all rows and all keys: trace((dO^T dO)(V^T V)) per head, O(T d^2)."""
    dtype = compute_dtype(output_gradient)
    value = _per_head(value, output_gradient.shape[1]).to(dtype)
    gradient = output_gradient.to(dtype)
    gram_gradient = gradient.transpose(-1, -2) @ gradient
    gram_value = value.transpose(-1, -2) @ value
    return (gram_gradient * gram_value).sum(dim=(-1, -2))


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


class _RowKL(torch.autograd.Function):
    """Makes the gradients along with the value and keeps nothing else; see ``row_kl``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        inputs: RowInputs,
        teacher: TeacherRows,
        weights: Tensor,
        differentiable: bool,
    ) -> Tensor:
        inputs = replace(inputs, query=query, key=key)
        differentiable = differentiable and any(ctx.needs_input_grad[:2])
        total, query_gradients, key_gradient = weights.new_zeros(()), [], None
        for part in _query_chunks(inputs):
            loss, logit_gradient = _coarse_kl(inputs, part, teacher, weights[:, :, part], differentiable)
            total += loss
            if logit_gradient is not None:
                for_queries, for_keys = _through_products(inputs, part, logit_gradient)
                query_gradients.append(for_queries)
                key_gradient = for_keys if key_gradient is None else key_gradient.add_(for_keys)
        if key_gradient is not None:
            # float16 would lose the small gradients of a mean over many rows before the loss scale multiplies them.
            dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
            ctx.save_for_backward(torch.cat(query_gradients, dim=2).to(dtype), key_gradient.to(dtype))
            ctx.dtype = query.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ((kept * outer[0]).to(ctx.dtype) for kept in ctx.saved_tensors)
        return query_gradient, key_gradient, None, None, None, None


def _coarse_kl(
    inputs: RowInputs, part: slice, teacher: TeacherRows, weight: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of ``weight`` (batch, heads, rows) times the KL of each row in nats, and its gradient at the row logits
    (batch, heads, rows, n_keys).

    That gradient is s * sum(p) - p for a student's row s; the remaining mass is spread in proportion to the student,
    so that the other keys get s * (sum(p) - remaining / others).
    """
    indices, kept, remaining = _teacher_part(teacher, part)
    logits = _logits(inputs, part)
    if inputs.mask.bias is not None:
        # As the query of a row that does not count, its bias may hold anything.
        logits.masked_fill_((weight == 0)[..., None], 0)
    rows = torch.softmax(logits, dim=-1)
    # The largest probability cannot underflow, so this is the log-sum-exp.
    log_sum = logits.amax(dim=-1) - rows.amax(dim=-1).log()
    # An entry of probability 0 is absent (batches are padded with index 0), so its key stays among the others: nothing
    # is subtracted there, where writing a 0 would erase the key.
    absent = kept == 0
    kept_log = (logits.gather(-1, indices) - log_sum[..., None]).masked_fill_(absent, 0)
    del logits
    stored = (torch.special.xlogy(kept, kept) - kept * kept_log).sum(dim=-1)
    at_stored = rows.gather(-1, indices).masked_fill_(absent, 0)
    # Summed directly, not as a difference from 1.
    rows.scatter_add_(-1, indices, -at_stored)
    others = rows.sum(dim=-1).clamp_min(torch.finfo(rows.dtype).tiny)
    rest = torch.special.xlogy(remaining, remaining) - remaining * others.log()
    loss = ((stored + rest) * weight).sum()
    if not differentiable:
        return loss, None
    mass = kept.sum(dim=-1) + remaining
    gradient = rows.mul_(((mass - remaining / others) * weight)[..., None])
    return loss, gradient.scatter_add_(-1, indices, (at_stored * mass[..., None] - kept) * weight[..., None])


def _through_products(inputs: RowInputs, part: slice, logit_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the query rows and of the keys, in the compute dtype."""
    dtype = logit_gradient.dtype
    query = inputs.query[:, :, part].to(dtype) * inputs.scaling
    return (logit_gradient @ inputs.key.to(dtype)) * inputs.scaling, logit_gradient.transpose(-1, -2) @ query


def _others(rows: Tensor, indices: Tensor, kept: Tensor) -> Tensor:
    """``rows`` with 0 at the stored keys. An entry of probability 0 is absent (batches are padded with index 0), so its
    key stays among the others: subtracting 0 there, where writing a 0 would erase the key."""
    stored = torch.where(kept > 0, rows.gather(-1, indices), 0)
    return rows.scatter_add(-1, indices, -stored)


def _teacher_part(teacher: TeacherRows, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    return (
        teacher.indices[:, :, part],
        teacher.probabilities[:, :, part],
        teacher.remaining[:, :, part],
    )


def _logits(inputs: RowInputs, part: slice) -> Tensor:
    dtype = compute_dtype(inputs.query)
    # The queries are scaled, which are fewer numbers than their products.
    logits = (inputs.query[:, :, part].to(dtype) * inputs.scaling) @ inputs.key.to(dtype).transpose(-1, -2)
    return logits.add_(inputs.mask.addend_of(part))


def _rows(tensor: Tensor, part: slice) -> Tensor:
    """The query rows ``part`` of a mask whose query axis may be 1 (the same for every query)."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, part]


def _query_chunks(inputs: RowInputs) -> Iterator[slice]:
    batch, heads, n_queries, _ = inputs.query.shape
    itemsize = 8 if inputs.query.dtype == torch.float64 else 4
    return _chunks(n_queries, batch * heads * inputs.key.shape[2] * itemsize, CHUNK_BYTES)


def _chunks(n_rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // max(1, bytes_per_row))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _per_head(value: Tensor, n_heads: int) -> Tensor:
    return value if value.shape[1] == n_heads else value.repeat_interleave(n_heads // value.shape[1], dim=1)
