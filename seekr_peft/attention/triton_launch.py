"""The row KL in three launches of triton kernels, straight from a layer's q and k, where a GPU and triton are at hand.

Optional and chosen at run time: ``row_divergence.row_kl`` computes the same anywhere, and this is tested against it.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import CaptureError
from ..sparse import SparseDistribution
from .masks import RowMask
from .pairs import HeadPairs
from .rows import CHUNK_BYTES
from .triton_arguments import KeysArguments, RowsArguments, SpreadArguments, shared_strides, strides

logger = logging.getLogger("seekr_peft")

WIDEST_HEAD = 256
"""The largest head dimension that the kernels can compute: a row of a larger one does not fit into the registers of a
GPU's multiprocessor."""

_BLOCK_Q, _BLOCK_K = 16, 64
"""Queries, and stored entries of each, that one kernel program works on at a time."""


@dataclass(frozen=True)
class FusedInputs:
    """A layer's q (batch, n_heads, T_q, d) and k (batch, n_kv_heads, T_k, d), as the kernel got them; the ``pairs``
    whose rows are wanted; ``positions`` int64 (batch, n_queries) and the ``mask`` of these rows, by sample and slot."""

    query: Tensor
    key: Tensor
    pairs: HeadPairs
    positions: Tensor
    mask: RowMask
    scaling: float


def suits(query: Tensor, key: Tensor, n_pairs: int, n_queries: int) -> bool:
    """Whether the kernels can compute ``n_queries`` rows of ``n_pairs`` heads of this layer, here. Said before anything
    of the layer is computed: a recomputation under activation checkpointing must take the same way as the forward."""
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
        and 4 * n_queries * key.shape[2] <= CHUNK_BYTES
        # Places are counted in 32 bits.
        and max(_extent(query), _extent(key), n_pairs * max(n_queries, key.shape[2]) * query.shape[-1]) < 2**31
        and _run_here(query.dtype, _blocks(query.shape[-1]).head_dim, query.device)
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
    teacher = SparseDistribution(
        torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device), single[..., None], 0 * single
    )
    try:
        pairs = HeadPairs.of_all(first[0], 1)
        inputs = FusedInputs(query, query, pairs, first, mask, 1.0)
        _, query_gradient, key_gradient = _values(inputs, teacher, single, differentiable=True)
        assert query_gradient is not None and key_gradient is not None
        _spread(single, pairs, first, query_gradient, key_gradient, [query, query])
        _wait(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning("the attention loss goes on without its triton kernels, which cannot run here: %s", reason)
        return False
    return True


def row_kl(inputs: FusedInputs, teacher: SparseDistribution, weights: Tensor) -> Tensor:
    """As ``row_divergence.row_kl`` of the pairs, for what ``suits``; the teacher's rows (1, n_pairs, n_queries, k).

    Raises:
        CaptureError: The teacher's rows are not those of these pairs and queries.
    """
    query = inputs.query
    shape = (1, len(inputs.pairs.heads), inputs.positions.shape[1])
    if teacher.indices.shape[:3] != shape:
        raise CaptureError(
            f"the teacher's rows are of {teacher.indices.shape[1]} heads (of all samples together) and "
            f"{teacher.indices.shape[2]} queries, the captured ones of {shape[1]} and {shape[2]}; pass the rows of the "
            f"same heads and queries."
        )
    teacher = teacher.to(query.device, torch.float32)
    weights = weights.to(query.device, torch.float32).expand(shape)
    total: Tensor = _FusedRowKL.apply(query, inputs.key, inputs, teacher, weights, torch.is_grad_enabled())
    return total


class _FusedRowKL(torch.autograd.Function):
    """Makes the gradients along with the value and keeps nothing else; see ``row_divergence.row_kl``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        inputs: FusedInputs,
        teacher: SparseDistribution,
        weights: Tensor,
        differentiable: bool,
    ) -> Tensor:
        differentiable = differentiable and any(ctx.needs_input_grad[:2])
        losses, query_gradient, key_gradient = _values(inputs, teacher, weights, differentiable)
        if differentiable:
            ctx.save_for_backward(inputs.positions, query_gradient, key_gradient)
            ctx.pairs = inputs.pairs
            # Their layout without their memory; of a view with gaps, or over itself, a whole one.
            ctx.like = [torch.empty_like(tensor, device="meta") for tensor in (query, key)]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        positions, query_gradient, key_gradient = ctx.saved_tensors
        all_queries, all_keys = _spread(outer[0], ctx.pairs, positions, query_gradient, key_gradient, ctx.like)
        return all_queries, all_keys, None, None, None, None


def _values(
    inputs: FusedInputs, teacher: SparseDistribution, weights: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weighted loss of each row (n_pairs, n_queries), float32, and the gradients of the pairs' queries (n_pairs,
    n_queries, d) and keys (n_pairs, T_k, d)."""
    from .triton_kernels import keys_kernel, rows_kernel

    query, key, pairs, positions = inputs.query, inputs.key, inputs.pairs, inputs.positions
    n_pairs, n_queries, n_kept = teacher.indices.shape[1:]
    n_keys, head_dim = key.shape[2:]
    addend, sees = inputs.mask.addend, inputs.mask.sees_a_key
    addend = addend.expand(query.shape[0], addend.shape[1], n_queries, n_keys)
    sees = sees.expand(query.shape[0], sees.shape[1], n_queries)
    indices, kept = teacher.indices[0].contiguous(), teacher.probabilities[0].contiguous()
    remaining, weights = teacher.remaining[0].contiguous(), weights[0]
    # float16 would lose the small gradients of a mean over many rows before the loss scale multiplies them.
    kept_dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    single = {"dtype": torch.float32, "device": query.device}
    at_once = min(n_pairs, CHUNK_BYTES // (4 * n_queries * n_keys))
    rows = torch.empty(at_once, n_queries, n_keys, **single)
    entries = torch.empty(at_once, n_queries, n_kept, **single)
    losses = torch.empty(n_pairs, n_queries, **single)
    query_gradient = torch.empty(n_pairs, n_queries, head_dim, dtype=kept_dtype, device=query.device)
    key_gradient = None
    if differentiable:
        key_gradient = torch.empty(n_pairs, n_keys, head_dim, dtype=kept_dtype, device=query.device)
    blocks = _blocks(head_dim)
    for start in range(0, n_pairs, at_once):
        part = slice(start, start + at_once)
        arguments = RowsArguments(
            query=query,
            key=key,
            samples=pairs.samples[part],
            heads=pairs.heads[part],
            slots=pairs.slots[part],
            positions=positions,
            addend=addend,
            sees=sees,
            weights=weights[part],
            indices=indices[part],
            kept=kept[part],
            remaining=remaining[part],
            rows=rows,
            entries=entries,
            losses=losses[part],
            query_gradient=query_gradient[part],
            **strides("bhtd", query=query, key=key),
            **strides("bq", positions=positions),
            # A mask of one head is that of every slot.
            **shared_strides("bhqk", addend=addend),
            **shared_strides("bhq", sees=sees),
            **strides("hq", weights=weights),
            n_queries=n_queries,
            n_keys=n_keys,
            n_kept=n_kept,
            head_dim=head_dim,
            group=query.shape[1] // key.shape[1],
            scaling=inputs.scaling,
        )
        n_here = len(arguments.samples)
        with _on(query.device):
            rows_kernel[(n_here, -(-n_queries // _BLOCK_Q))](
                *arguments,
                DIFFERENTIABLE=differentiable,
                BLOCK_Q=_BLOCK_Q,
                BLOCK_T=blocks.positions,
                BLOCK_D=blocks.head_dim,
                BLOCK_K=_BLOCK_K,
                num_warps=blocks.warps,
            )
            if key_gradient is not None:
                keys_kernel[(n_here, -(-n_keys // blocks.positions))](
                    *KeysArguments.after(arguments, key_gradient[part]),
                    BLOCK_Q=_BLOCK_Q,
                    BLOCK_T=blocks.positions,
                    BLOCK_D=blocks.head_dim,
                    num_warps=blocks.warps,
                )
    return losses, None if key_gradient is None else query_gradient, key_gradient


def _spread(
    outer: Tensor,
    pairs: HeadPairs,
    positions: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
    like: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """``outer`` times the gradients, as gradients of all heads' q and k, which are laid out as ``like``."""
    from .triton_kernels import spread_kernel

    all_queries, all_keys = (torch.empty_like(tensor, device=outer.device) for tensor in like)
    batch, n_query_heads, n_positions, head_dim = all_queries.shape
    n_key_heads, n_keys = all_keys.shape[1:3]
    blocks = _blocks(head_dim)
    arguments = SpreadArguments(
        outer=outer,
        starts=pairs.starts,
        heads=pairs.heads,
        positions=positions,
        query_gradient=query_gradient,
        key_gradient=key_gradient,
        all_queries=all_queries,
        all_keys=all_keys,
        **strides("bq", positions=positions),
        **strides("bhtd", all_queries=all_queries, all_keys=all_keys),
        n_query_heads=n_query_heads,
        n_key_heads=n_key_heads,
        n_queries=query_gradient.shape[1],
        n_positions=n_positions,
        n_keys=n_keys,
        head_dim=head_dim,
        group=n_query_heads // n_key_heads,
    )
    with _on(outer.device):
        spread_kernel[(batch * (n_query_heads + n_key_heads), -(-max(n_positions, n_keys) // blocks.positions))](
            *arguments,
            BLOCK_Q=_BLOCK_Q,
            BLOCK_T=blocks.positions,
            BLOCK_D=blocks.head_dim,
            num_warps=blocks.warps,
        )
    return all_queries, all_keys


class _Blocks(NamedTuple):
    """What one kernel program works on at a time."""

    head_dim: int
    """Numbers of a head: the head's own size, rounded up to a power of two."""
    positions: int
    """Positions whose keys (or queries) are held beside them."""
    warps: int


def _blocks(head_dim: int) -> _Blocks:
    """The block sizes for heads of ``head_dim`` numbers.

    As many positions as fit, at that head size, into the 64 kB of shared memory that a T4 has; of the sizes that fit,
    those that were fastest on an H100 (100 queries, T = 1024)."""
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    if block_d <= 64:
        return _Blocks(block_d, 128, 8)
    return _Blocks(block_d, 64 if block_d <= 128 else 32, 4)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
