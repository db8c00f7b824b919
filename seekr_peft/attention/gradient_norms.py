"""Sums of squares of the gradient at the attention rows, from the gradient of the attention's output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse import compute_dtype
from .masks import rows_of
from .rows import CHUNK_BYTES, chunks, outside_autocast


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
    for part in chunks(n_queries, total.numel() * value.shape[2] * value.element_size(), chunk_bytes):
        gradient = output_gradient[:, :, part].to(dtype) @ value.transpose(-1, -2)
        total += torch.where(rows_of(allowed, part), gradient, 0).square().sum(dim=(-1, -2))
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


def _per_head(value: Tensor, n_heads: int) -> Tensor:
    return value if value.shape[1] == n_heads else value.repeat_interleave(n_heads // value.shape[1], dim=1)
