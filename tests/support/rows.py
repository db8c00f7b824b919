"""Random rows, and the slow loss and gradients that they are compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.rows import RowInputs
from seekr_peft.sparse import compute_dtype

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 3, 5, 11, 7


def make_inputs(dtype: torch.dtype = torch.float64, bias: bool = True, masked: float = 0.3, **sizes: int) -> RowInputs:
    """Random rows; every query may look at key 0, and the last query of sample 0 is padding."""
    batch, heads, n_queries, n_keys, dim = {
        **{"batch": BATCH, "heads": HEADS, "n_queries": QUERIES, "n_keys": KEYS, "dim": DIM},
        **sizes,
    }.values()
    allowed = torch.rand(batch, 1, n_queries, n_keys) >= masked
    allowed[..., 0] = True
    real = torch.ones(batch, n_queries, dtype=torch.bool)
    real[0, -1] = n_queries == 1
    return RowInputs(
        query=torch.randn(batch, heads, n_queries, dim, dtype=dtype).requires_grad_(),
        key=torch.randn(batch, heads, n_keys, dim, dtype=dtype).requires_grad_(),
        mask=RowMask(allowed, torch.randn(1, heads, n_queries, n_keys, dtype=dtype) if bias else None),
        real=real,
        scaling=0.6,
    )


def blind(inputs: RowInputs, rows: Any) -> RowInputs:
    """``inputs`` in which ``rows`` may look nowhere."""
    allowed = inputs.mask.allowed.clone()
    allowed[rows] = False
    return replace(inputs, mask=RowMask(allowed, inputs.mask.bias))


def make_teacher(inputs: RowInputs) -> Tensor:
    """Dense teacher rows with the same masks as ``inputs``, from other queries."""
    shape = torch.broadcast_shapes(inputs.mask.allowed.shape, (1, inputs.query.shape[1], 1, 1))
    logits = 2 * torch.randn(shape, dtype=compute_dtype(inputs.query))
    return torch.softmax(logits.masked_fill(~inputs.mask.allowed, float("-inf")), dim=-1).nan_to_num(0)


def slow_student(inputs: RowInputs) -> Tensor:
    """Softmax of q k^T by plain autograd."""
    logits = torch.einsum("bhqd,bhkd->bhqk", inputs.query, inputs.key) * inputs.scaling
    if inputs.mask.bias is not None:
        logits = logits + inputs.mask.bias
    return torch.softmax(logits.masked_fill(~inputs.mask.allowed, float("-inf")), dim=-1)


def gradients(loss: Tensor, inputs: RowInputs) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (inputs.query, inputs.key))
