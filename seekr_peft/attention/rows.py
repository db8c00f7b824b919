"""Attention rows of selected heads and queries: what they are computed from, their softmax, and how they are walked.

Never builds an array of heads x T x T: everything is at most heads x queries x T, and longer query lists are walked in
chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..sparse import compute_dtype
from .masks import RowMask
from .pairs import PairMask

Result = TypeVar("Result")

CHUNK_BYTES = 32 * 2**20
"""Upper limit of one chunk of row logits, in bytes; a longer list of queries is split."""


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
    rows = torch.softmax(row_logits(inputs, slice(None)), dim=-1)
    return torch.where(inputs.real[:, None, :, None] & inputs.mask.allowed, rows, 0)


def row_weights(real: Tensor, n_heads: int) -> Tensor:
    """Weights (batch, n_heads, n_queries) of a mean over heads and queries per sample, then over samples.

    Padding weighs 0. The released code averages rows per sample and then samples; with samples of different length
    this differs from pooling all rows.
    """
    counts = real.sum(dim=1, keepdim=True).clamp_min(1)
    weights = real / counts / (real.shape[0] * n_heads)
    return weights[:, None, :].expand(-1, n_heads, -1)


def row_logits(inputs: RowInputs, part: slice) -> Tensor:
    """Masked logits (batch, heads, rows, n_keys) of the query rows ``part``, in the compute dtype."""
    dtype = compute_dtype(inputs.query)
    # The queries are scaled, which are fewer numbers than their products.
    logits = (inputs.query[:, :, part].to(dtype) * inputs.scaling) @ inputs.key.to(dtype).transpose(-1, -2)
    return logits.add_(inputs.mask.addend_of(part))


def query_chunks(inputs: RowInputs) -> Iterator[slice]:
    """The query rows, as many at once as ``CHUNK_BYTES`` of their logits allow."""
    batch, heads, n_queries, _ = inputs.query.shape
    itemsize = 8 if inputs.query.dtype == torch.float64 else 4
    return chunks(n_queries, batch * heads * inputs.key.shape[2] * itemsize, CHUNK_BYTES)


def chunks(n_rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    """``n_rows`` rows in turn, as many at once as ``chunk_bytes`` allow, but one at least."""
    step = max(1, chunk_bytes // max(1, bytes_per_row))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
