"""The row KL in three launches of triton kernels, straight from a layer's q and k, where a GPU and triton are at hand.

Optional and chosen at run time: ``row_kl`` of ``rows`` computes the same anywhere and is what this is tested against.
May import ``rows`` and ``kernels``.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rows import CHUNK_BYTES, RowMask, TeacherRows

logger = logging.getLogger("seekr_peft")

WIDEST_HEAD = 256
"""Of a head's numbers; wider ones do not fit into a multiprocessor's registers."""

_BLOCK_Q, _BLOCK_K = 16, 64
_failed = False


@dataclass(frozen=True)
class FusedInputs:
    """A layer's q (batch, n_heads, T_q, d) and k (batch, n_kv_heads, T_k, d), as the kernel got them; ``heads`` int64
    (n_selected,), ``positions`` int64 (batch, n_queries) and the ``mask`` of these rows."""

    query: Tensor
    key: Tensor
    heads: Tensor
    positions: Tensor
    mask: RowMask
    scaling: float


def suits(query: Tensor, key: Tensor, n_rows: int) -> bool:
    """Whether the kernels can compute ``n_rows`` rows of each sample of this layer."""
    return (
        query.is_cuda
        and not _failed
        and query.dtype == key.dtype
        and query.shape[-1] == key.shape[-1] <= WIDEST_HEAD
        and _supported(query.dtype)
        and 4 * n_rows * query.shape[0] * key.shape[2] <= CHUNK_BYTES
    )


@cache
def _supported(dtype: torch.dtype) -> bool:
    return find_spec("triton") is not None and dtype in (torch.float32, torch.float16, torch.bfloat16)


def row_kl(inputs: FusedInputs, teacher: TeacherRows, weights: Tensor) -> Tensor | None:
    """As ``rows.row_kl``; None where the kernels cannot be built, which is said once."""
    global _failed
    query = inputs.query
    teacher, weights = teacher.to(query.device, torch.float32), weights.to(query.device, torch.float32)
    try:
        total: Tensor = _FusedRowKL.apply(query, inputs.key, inputs, teacher, weights, torch.is_grad_enabled())
        return total
    except Exception as error:
        # Triton compiles at the first call: a machine without a C compiler fails there, in many ways.
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        _failed = True
        reason = " ".join(str(error).split())[:300]
        logger.warning("the attention loss goes on without its triton kernels, which cannot run here: %s", reason)
        return None


class _FusedRowKL(torch.autograd.Function):
    """Makes the gradients along with the value and keeps nothing else; see ``rows.row_kl``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        inputs: FusedInputs,
        teacher: TeacherRows,
        weights: Tensor,
        differentiable: bool,
    ) -> Tensor:
        from .kernels import keys_kernel, rows_kernel

        differentiable = differentiable and any(ctx.needs_input_grad[:2])
        heads, positions = inputs.heads, inputs.positions
        batch, n_heads, n_queries, n_kept = teacher.indices.shape
        n_keys, head_dim = key.shape[2:]
        addend = inputs.mask.addend.expand(batch, n_heads, n_queries, n_keys)
        sees = inputs.mask.sees_a_key.expand(batch, n_heads, n_queries)
        # float16 would lose the small gradients of a mean over many rows before the loss scale multiplies them.
        kept_dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        single = {"dtype": torch.float32, "device": query.device}
        rows = torch.empty(batch, n_heads, n_queries, n_keys, **single)
        entries = torch.empty(teacher.indices.shape, **single)
        losses = torch.empty(batch, n_heads, n_queries, **single)
        query_gradient = torch.empty(batch, n_heads, n_queries, head_dim, dtype=kept_dtype, device=query.device)
        block_d, block_t, warps = _blocks(head_dim)
        with _on(query.device):
            rows_kernel[(batch * n_heads, -(-n_queries // _BLOCK_Q))](
                query,
                key,
                heads,
                positions,
                addend,
                sees,
                weights,
                teacher.indices.contiguous(),
                teacher.probabilities.contiguous(),
                teacher.remaining.contiguous(),
                rows,
                entries,
                losses,
                query_gradient,
                *query.stride(),
                *key.stride(),
                *positions.stride(),
                *addend.stride(),
                *sees.stride(),
                *weights.stride(),
                n_heads,
                n_queries,
                n_keys,
                n_kept,
                head_dim,
                query.shape[1] // key.shape[1],
                inputs.scaling,
                DIFFERENTIABLE=differentiable,
                BLOCK_Q=_BLOCK_Q,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                BLOCK_K=_BLOCK_K,
                num_warps=warps,
            )
            if differentiable:
                key_gradient = torch.empty(batch, n_heads, n_keys, head_dim, dtype=kept_dtype, device=query.device)
                keys_kernel[(batch * n_heads, -(-n_keys // block_t))](
                    query,
                    heads,
                    positions,
                    sees,
                    weights,
                    rows,
                    key_gradient,
                    *query.stride(),
                    *positions.stride(),
                    *sees.stride(),
                    *weights.stride(),
                    n_heads,
                    n_queries,
                    n_keys,
                    head_dim,
                    inputs.scaling,
                    BLOCK_Q=_BLOCK_Q,
                    BLOCK_T=block_t,
                    BLOCK_D=block_d,
                    num_warps=warps,
                )
                ctx.save_for_backward(query_gradient, key_gradient, heads, positions)
                ctx.layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (query, key)]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        from .kernels import spread_kernel

        query_gradient, key_gradient, heads, positions = ctx.saved_tensors
        all_queries, all_keys = (
            torch.empty_strided(shape, stride, dtype=dtype, device=heads.device) for shape, stride, dtype in ctx.layouts
        )
        batch, n_query_heads, n_positions, head_dim = all_queries.shape
        n_key_heads, n_keys = all_keys.shape[1:3]
        block_d, block_t, warps = _blocks(head_dim)
        with _on(heads.device):
            spread_kernel[(batch * (n_query_heads + n_key_heads), -(-max(n_positions, n_keys) // block_t))](
                outer[0],
                heads,
                positions,
                query_gradient,
                key_gradient,
                all_queries,
                all_keys,
                *positions.stride(),
                *all_queries.stride(),
                *all_keys.stride(),
                query_gradient.shape[1],
                n_query_heads,
                n_key_heads,
                query_gradient.shape[2],
                n_positions,
                n_keys,
                head_dim,
                n_query_heads // n_key_heads,
                BLOCK_Q=_BLOCK_Q,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                num_warps=warps,
            )
        return all_queries, all_keys, None, None, None, None


def _blocks(head_dim: int) -> tuple[int, int, int]:
    """A power of two of a head's numbers; positions, of which as many fit beside them into the 64 kB of shared memory
    that a T4 has; warps. Of what fits, the fastest on an H100 (100 queries, T = 1024)."""
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    if block_d <= 64:
        return block_d, 128, 8
    return block_d, 64 if block_d <= 128 else 32, 4


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
