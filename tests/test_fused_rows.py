"""The triton kernels of the row KL against the plain computation in float64, and what happens where they cannot run.

The kernels run on a GPU, or on a CPU in triton's interpreter (``TRITON_INTERPRET=1``, with triton installed).
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from seekr_peft.attention import triton_launch as fused
from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.pairs import HeadPairs, PairMask
from seekr_peft.attention.row_divergence import row_kl
from seekr_peft.attention.rows import RowInputs
from seekr_peft.errors import CaptureError
from seekr_peft.sparse import SparseDistribution

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton and a GPU (make test-gpu), or TRITON_INTERPRET=1",
)
PRECISION = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error of a gradient: of float32's sums, or of two roundings to the dtype of q and k."""


def layer(
    dtype: torch.dtype, bias: bool, repeated: bool, sizes: tuple[Any, ...], own: bool = False
) -> tuple[fused.FusedInputs, SparseDistribution, Tensor]:
    """Random q and k as a model lays them out, a mask in which one row sees nothing, and a teacher. ``own``: each
    sample has some of the heads, one has none."""
    batch, n_heads, n_kv, chosen, t_q, t_k, n_queries, dim, top_k = sizes
    query = torch.randn(batch, t_q, n_heads, dim).to(DEVICE, dtype).transpose(1, 2).requires_grad_()
    key = torch.randn(batch, t_k, n_kv, dim).to(DEVICE, dtype).transpose(1, 2).requires_grad_()
    heads = torch.randperm(n_heads)[:chosen].sort().values.to(DEVICE)
    pairs = own_pairs(heads, batch) if own else HeadPairs.of_all(heads, batch)
    draw = (lambda: torch.randint(0, t_q, (n_queries,))) if repeated else (lambda: torch.randperm(t_q)[:n_queries])
    positions = torch.stack([draw() for _ in range(batch)]).to(DEVICE)
    allowed = torch.rand(batch, 1, n_queries, t_k, device=DEVICE) > 0.3
    allowed[..., 0] = True
    allowed[0, 0, -1] = False
    mask = RowMask(allowed, torch.randn(1, chosen, n_queries, t_k, device=DEVICE) if bias else None)
    logits = 2 * torch.randn(1, len(pairs.heads), n_queries, t_k, device=DEVICE)
    blocked = ~PairMask(mask, pairs).allowed
    rows = torch.softmax(logits.masked_fill(blocked, float("-inf")), dim=-1).nan_to_num(0)
    weights = torch.rand(1, len(pairs.heads), n_queries, device=DEVICE)
    weights = weights * (torch.rand_like(weights) > 0.3)
    inputs = fused.FusedInputs(query, key, pairs, positions, mask, dim**-0.5)
    return inputs, SparseDistribution.from_dense(rows, top_k), weights


def own_pairs(heads: Tensor, batch: int) -> HeadPairs:
    """The last sample has none; each other one has one head more than the one before, from the last on."""
    chosen = [list(range(len(heads)))[-1 - i :] for i in range(batch - 1)] + [[]]
    counts = tuple(len(slots) for slots in chosen)
    slots = torch.tensor([slot for own in chosen for slot in own], device=DEVICE)
    samples = torch.arange(batch, device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    starts = torch.tensor([sum(counts[:i]) for i in range(batch + 1)], device=DEVICE)
    return HeadPairs(samples, heads[slots], slots, starts, counts)


def exact(inputs: fused.FusedInputs, teacher: SparseDistribution, weights: Tensor) -> tuple[Tensor, ...]:
    """Loss and a thousand times the gradients at all heads' q and k, plainly in float64."""
    query = inputs.query.detach().double().requires_grad_()
    key = inputs.key.detach().double().requires_grad_()
    bias = None if inputs.mask.bias is None else inputs.mask.bias.double()
    rows = RowInputs(
        inputs.pairs.queries(query, inputs.positions),
        inputs.pairs.keys(key, query.shape[1]),
        PairMask(RowMask(inputs.mask.allowed, bias), inputs.pairs),
        torch.ones(1, weights.shape[2], dtype=torch.bool, device=DEVICE),
        inputs.scaling,
    )
    loss = row_kl(rows, teacher, weights)
    return loss, *torch.autograd.grad(1000 * loss, (query, key))


def check(
    inputs: fused.FusedInputs, teacher: SparseDistribution, weights: Tensor, expected: tuple[Tensor, ...] | None = None
) -> None:
    """The kernels' loss and gradients against ``expected``, by default the plain ones of these inputs."""
    expected = expected or exact(inputs, teacher, weights)
    loss = fused.row_kl(inputs, teacher, weights)
    gradients = torch.autograd.grad(1000 * loss, (inputs.query, inputs.key))
    torch.testing.assert_close(loss.double(), expected[0], rtol=5e-6, atol=1e-6)
    for found, other, leaf in zip(gradients, expected[1:], (inputs.query, inputs.key), strict=True):
        assert found.dtype == leaf.dtype and found.stride() == leaf.stride()
        assert float((found.double() - other).norm()) <= PRECISION[leaf.dtype] * float(other.norm())


@needs_kernels
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        # batch, heads, kv heads, selected, T_q, T_k, queries, head_dim, stored entries
        (1, 4, 4, 2, 20, 20, 5, 10, None),
        (2, 6, 2, 5, 30, 30, 7, 10, 4),
        (1, 8, 2, 3, 70, 90, 20, 32, 1),
        (2, 4, 4, 4, 33, 33, 33, 24, 100),
        (1, 2, 1, 2, 16, 130, 16, 64, 70),
        (1, 1, 1, 1, 1, 1, 1, 16, 1),
        (1, 2, 2, 1, 40, 40, 17, 130, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_equal_the_plain_computation_in_float64(dtype: torch.dtype, sizes: Any, bias: bool) -> None:
    check(*layer(dtype, bias, repeated=False, sizes=sizes))


@needs_kernels
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("sizes", [(4, 6, 2, 5, 30, 30, 7, 10, 4), (2, 8, 8, 3, 40, 90, 20, 32, 9)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_samples_may_have_heads_of_their_own(dtype: torch.dtype, sizes: Any, bias: bool) -> None:
    check(*layer(dtype, bias, repeated=False, sizes=sizes, own=True))


@needs_kernels
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_many_heads_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    inputs, teacher, weights = layer(
        torch.float32, True, repeated=False, sizes=(3, 6, 2, 5, 30, 30, 7, 10, 4), own=True
    )
    monkeypatch.setattr(fused, "CHUNK_BYTES", at_once * 4 * 7 * 30)
    check(inputs, teacher, weights)


@needs_kernels
def test_a_position_that_is_asked_for_twice_gets_both_gradients() -> None:
    check(*layer(torch.float32, False, repeated=True, sizes=(2, 4, 2, 3, 9, 9, 12, 10, 4)))


@needs_kernels
def test_what_a_row_without_weight_holds_reaches_nobody() -> None:
    inputs, teacher, weights = layer(torch.float32, True, repeated=False, sizes=(1, 2, 2, 2, 20, 20, 6, 16, 4))
    weights[:, :, 2] = 0
    expected = exact(inputs, teacher, weights)
    with torch.no_grad():
        inputs.query[0, :, inputs.positions[0, 2]] = float("nan")
    assert inputs.mask.bias is not None
    inputs.mask.bias[:, :, 2] = float("inf")
    teacher.probabilities[:, :, 2] = float("nan")
    teacher.remaining[:, :, 2] = float("nan")
    check(inputs, teacher, weights, expected)


@needs_kernels
def test_a_row_that_may_look_nowhere_passes_no_nan_on_to_the_keys() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 2, 2, 2, 20, 20, 6, 16, 4))
    expected = exact(inputs, teacher, weights.fill_(1))
    with torch.no_grad():
        inputs.query[0, :, inputs.positions[0, -1]] = float("nan")
    check(inputs, teacher, weights, expected)


@needs_kernels
def test_a_nan_in_a_row_that_counts_is_not_hidden() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 2, 2, 2, 20, 20, 6, 16, 4))
    with torch.no_grad():
        inputs.query[0, :, inputs.positions[0, 1]] = float("nan")
    loss = fused.row_kl(inputs, teacher, torch.ones_like(weights))
    assert loss.isnan()


@needs_kernels
def test_without_a_gradient_the_value_is_the_same() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 2, 2, 2, 20, 20, 6, 16, 4))
    with torch.no_grad():
        plain = fused.row_kl(inputs, teacher, weights)
    assert not plain.requires_grad
    torch.testing.assert_close(plain.double(), exact(inputs, teacher, weights)[0], rtol=5e-6, atol=1e-6)


@needs_kernels
def test_keys_that_lie_over_each_other_get_gradients_of_their_own() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 4, 1, 2, 20, 20, 6, 16, 4))
    shared = inputs.key.detach().expand(-1, 4, -1, -1).requires_grad_()
    inputs = replace(inputs, key=shared)
    expected = exact(inputs, teacher, weights)
    found = torch.autograd.grad(1000 * fused.row_kl(inputs, teacher, weights), (inputs.query, shared))
    for one, other in zip(found, expected[1:], strict=True):
        assert float((one.double() - other).norm()) <= 2e-6 * float(other.norm())


@needs_kernels
def test_the_kernels_try_themselves_on_a_few_numbers() -> None:
    for head_dim in (16, 64, 128, 256):
        assert fused._run_here.__wrapped__(torch.float32, head_dim, torch.device(DEVICE))


@needs_kernels
def test_rows_of_other_heads_or_samples_are_refused() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 4, 2, 2, 20, 20, 6, 16, 4))
    with pytest.raises(CaptureError, match=r"are of 2 heads \(of all samples together\) and 6 queries, .* of 1 and 6"):
        fused.row_kl(replace(inputs, pairs=HeadPairs.of_all(inputs.pairs.heads[:1], 1)), teacher, weights)


@needs_kernels
@pytest.mark.parametrize("place", [-1, 20, 2**31 - 1])
def test_a_stored_place_that_does_not_exist_makes_the_loss_nan(place: int) -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 4, 2, 2, 20, 20, 6, 16, 4))
    weights.fill_(1)
    indices = teacher.indices.clone()
    indices[0, 0, 0, 0] = place
    assert not fused.row_kl(inputs, teacher, weights).isnan()
    assert fused.row_kl(inputs, replace(teacher, indices=indices), weights).isnan()


@needs_kernels
def test_one_weight_for_all_heads_is_enough() -> None:
    inputs, teacher, weights = layer(torch.float32, False, repeated=False, sizes=(1, 4, 2, 3, 20, 20, 6, 16, 4))
    same = weights[:, :1].clone()
    found = fused.row_kl(inputs, teacher, same)
    torch.testing.assert_close(found.double(), exact(inputs, teacher, same.expand_as(weights))[0], rtol=5e-6, atol=1e-6)


def test_a_machine_that_cannot_build_the_kernels_is_told_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: Any, **options: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused, "_values", no_compiler)
    fused._run_here.cache_clear()
    try:
        assert not any(fused._run_here(torch.float32, 32, torch.device("cpu")) for _ in range(3))
    finally:
        fused._run_here.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Failed to find C compiler." in record.message


def test_the_kernels_are_for_a_gpu_and_for_what_fits() -> None:
    query, key = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    assert not fused.suits(query, key, 4, 100)
    if torch.cuda.is_available() and find_spec("triton"):
        query, key = query.cuda(), key.cuda()
        assert fused.suits(query, key, 4, 100)
        assert not fused.suits(query.double(), key.double(), 4, 100)
        assert not fused.suits(query, key.half(), 4, 100)
        assert not fused.suits(query, key, 4, 10**9)
        assert not fused.suits(query, key, 10**9, 100)
