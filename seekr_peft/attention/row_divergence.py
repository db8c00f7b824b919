"""KL divergence of a teacher's attention rows and the student's, with a hand-written gradient. Pure tensor code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sparse import SparseDistribution, compute_dtype, partition_kl
from .rows import RowInputs, outside_autocast, query_chunks, row_logits, row_weights


@outside_autocast
def row_kl(inputs: RowInputs, teacher: SparseDistribution, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of KL(teacher row || student row); scalar in nats, float32 (float64 for float64 input).

    With a remaining mass r it is the ``partition_kl``. For row logits s the gradient is softmax(s) * sum(p) - p, where
    r is spread over the other keys in proportion to the student. It is made along with the value, so that a row is
    computed once and what waits for the backward is as small as q and k.

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
    teacher = SparseDistribution(
        teacher.indices.long(),
        torch.where(counts[..., None], teacher.probabilities, 0),
        torch.where(counts, teacher.remaining, 0),
    )
    return _RowKL.apply(query, inputs.key, inputs, teacher, weights, torch.is_grad_enabled())


def kl_of_rows(rows: Tensor, teacher: SparseDistribution, weights: Tensor) -> Tensor:
    """The same loss from materialised student rows (batch, heads, n_queries, n_keys), by plain autograd.

    For models whose kernel returns the weights (eager); ``row_kl`` is tested against it.
    """
    teacher = teacher.to(rows.device, compute_dtype(rows))
    teacher, weights = replace(teacher, indices=teacher.indices.long()), weights.to(rows.device)
    # The outer where() below guards the value; this one guards the gradient against 0 * NaN.
    rows = torch.where((weights > 0)[..., None], rows, 0)
    tiny = torch.finfo(rows.dtype).tiny
    log_kept = rows.gather(-1, teacher.indices).clamp_min(tiny).log()
    others = rows.scatter_add(-1, teacher.indices, -teacher.at(rows)).sum(dim=-1)
    per_row = partition_kl(teacher, log_kept, others.clamp_min(tiny).log())
    return (torch.where(weights > 0, per_row, 0) * weights.to(per_row)).sum()


class _RowKL(torch.autograd.Function):
    """Makes the gradients along with the value and keeps nothing else; see ``row_kl``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        inputs: RowInputs,
        teacher: SparseDistribution,
        weights: Tensor,
        differentiable: bool,
    ) -> Tensor:
        inputs = replace(inputs, query=query, key=key)
        differentiable = differentiable and any(ctx.needs_input_grad[:2])
        total, query_gradients, key_gradient = weights.new_zeros(()), [], None
        for part in query_chunks(inputs):
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
    inputs: RowInputs, part: slice, teacher: SparseDistribution, weight: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of ``weight`` (batch, heads, rows) times the KL of each row in nats, and its gradient at the row logits
    (batch, heads, rows, n_keys).

    That gradient is s * sum(p) - p for a student's row s; the remaining mass is spread in proportion to the student,
    so that the other keys get s * (sum(p) - remaining / others).
    """
    teacher = _rows_of(teacher, part)
    logits = row_logits(inputs, part)
    if inputs.mask.bias is not None:
        # As the query of a row that does not count, its bias may hold anything.
        logits.masked_fill_((weight == 0)[..., None], 0)
    rows = torch.softmax(logits, dim=-1)
    # The largest probability cannot underflow, so this is the log-sum-exp.
    log_sum = logits.amax(dim=-1) - rows.amax(dim=-1).log()
    log_kept = logits.gather(-1, teacher.indices) - log_sum[..., None]
    del logits
    # An absent entry's key stays among the others: nothing is subtracted there, where writing a 0 would erase it.
    at_stored = teacher.at(rows)
    # Summed directly, not as a difference from 1.
    rows.scatter_add_(-1, teacher.indices, -at_stored)
    others = rows.sum(dim=-1).clamp_min(torch.finfo(rows.dtype).tiny)
    loss = (partition_kl(teacher, log_kept, others.log()) * weight).sum()
    if not differentiable:
        return loss, None
    kept, remaining = teacher.probabilities, teacher.remaining
    mass = kept.sum(dim=-1) + remaining
    gradient = rows.mul_(((mass - remaining / others) * weight)[..., None])
    return loss, gradient.scatter_add_(-1, teacher.indices, (at_stored * mass[..., None] - kept) * weight[..., None])


def _through_products(inputs: RowInputs, part: slice, logit_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the query rows and of the keys, in the compute dtype."""
    dtype = logit_gradient.dtype
    query = inputs.query[:, :, part].to(dtype) * inputs.scaling
    return (logit_gradient @ inputs.key.to(dtype)) * inputs.scaling, logit_gradient.transpose(-1, -2) @ query


def _rows_of(teacher: SparseDistribution, part: slice) -> SparseDistribution:
    """The queries ``part``."""
    return SparseDistribution(
        teacher.indices[:, :, part], teacher.probabilities[:, :, part], teacher.remaining[:, :, part]
    )
