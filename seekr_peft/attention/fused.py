"""The row KL in three launches of triton kernels, straight from a layer's q and k, where a GPU and triton are at hand.

Optional and chosen at run time: ``row_kl`` of ``rows`` computes the same anywhere and is what this is tested against.
May import ``rows``, ``kernels`` and ``errors``.
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

from ..errors import CaptureError
from .rows import CHUNK_BYTES, RowMask, TeacherRows

logger = logging.getLogger("seekr_peft")

WIDEST_HEAD = 256
"""Of a head's numbers; wider ones do not fit into a multiprocessor's registers."""

_BLOCK_Q, _BLOCK_K = 16, 64


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
    """Whether the kernels can compute ``n_rows`` rows of each sample of this layer, here. Said before anything of the
    layer is computed: a recomputation under activation checkpointing must take the same way as the forward did."""
    return (
        query.is_cuda
        # No stand-in for a tensor, and no time at which a try would fail that works at others.
        and type(query) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        # AMD's compiler promises less about what a barrier orders.
        and torch.version.hip is None
        and query.dtype == key.dtype
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and query.shape[-1] == key.shape[-1] <= WIDEST_HEAD
        and 4 * n_rows * query.shape[0] * key.shape[2] <= CHUNK_BYTES
        # Places are counted in 32 bits.
        and max(_extent(query), _extent(key)) < 2**31
        and _run_here(query.dtype, _blocks(query.shape[-1])[0], query.device)
    )


def _extent(tensor: Tensor) -> int:
    """Numbers from the first to the last element, where they lie."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@cache
def _run_here(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Tried once on a few numbers: triton compiles at the first call, and a machine without a C compiler, or with a
    driver that is too old, fails there in many ways."""
    if find_spec("triton") is None:
        return False
    query = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    single = torch.ones(1, 1, 1, device=device)
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    mask = RowMask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device))
    teacher = TeacherRows(torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device), single[..., None], 0 * single)
    try:
        inputs = FusedInputs(query, query, first[0], first, mask, 1.0)
        _, query_gradient, key_gradient = _values(inputs, teacher, single, differentiable=True)
        assert query_gradient is not None and key_gradient is not None
        _spread(single, first[0], first, query_gradient, key_gradient, [query, query])
        _wait(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning("the attention loss goes on without its triton kernels, which cannot run here: %s", reason)
        return False
    return True


def row_kl(inputs: FusedInputs, teacher: TeacherRows, weights: Tensor) -> Tensor:
    """As ``rows.row_kl``, for what ``suits``.

    Raises:
        CaptureError: The teacher's rows are not those of these samples, heads and queries.
    """
    query = inputs.query
    shape = (query.shape[0], inputs.heads.numel(), inputs.positions.shape[1])
    if teacher.indices.shape[:3] != shape:
        raise CaptureError(
            f"the teacher's rows have the shape {tuple(teacher.indices.shape[:3])} and the captured ones {shape} "
            f"(samples, heads, queries); pass the rows of the same heads and queries."
        )
    teacher = teacher.to(query.device, torch.float32)
    weights = weights.to(query.device, torch.float32).expand(shape)
    total: Tensor = _FusedRowKL.apply(query, inputs.key, inputs, teacher, weights, torch.is_grad_enabled())
    return total


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
        differentiable = differentiable and any(ctx.needs_input_grad[:2])
        losses, query_gradient, key_gradient = _values(inputs, teacher, weights, differentiable)
        if differentiable:
            ctx.save_for_backward(inputs.heads, inputs.positions, query_gradient, key_gradient)
            # Their layout without their memory; of a view with gaps, or over itself, a whole one.
            ctx.like = [torch.empty_like(tensor, device="meta") for tensor in (query, key)]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        heads, positions, query_gradient, key_gradient = ctx.saved_tensors
        all_queries, all_keys = _spread(outer[0], heads, positions, query_gradient, key_gradient, ctx.like)
        return all_queries, all_keys, None, None, None, None


def _values(
    inputs: FusedInputs, teacher: TeacherRows, weights: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weighted loss of each row (batch, heads, n_queries), float32, and the gradients of the selected heads' queries
    (batch, heads, n_queries, d) and keys (batch, heads, T_k, d)."""
    from .kernels import keys_kernel, rows_kernel

    query, key, heads, positions = inputs.query, inputs.key, inputs.heads, inputs.positions
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
        if not differentiable:
            return losses, None, None
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
    return losses, query_gradient, key_gradient


def _spread(
    outer: Tensor, heads: Tensor, positions: Tensor, query_gradient: Tensor, key_gradient: Tensor, like: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """``outer`` times the gradients, as gradients of all heads' q and k, which are laid out as ``like``."""
    from .kernels import spread_kernel

    all_queries, all_keys = (torch.empty_like(tensor, device=heads.device) for tensor in like)
    batch, n_query_heads, n_positions, head_dim = all_queries.shape
    n_key_heads, n_keys = all_keys.shape[1:3]
    block_d, block_t, warps = _blocks(head_dim)
    with _on(heads.device):
        spread_kernel[(batch * (n_query_heads + n_key_heads), -(-max(n_positions, n_keys) // block_t))](
            outer,
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
    return all_queries, all_keys


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
