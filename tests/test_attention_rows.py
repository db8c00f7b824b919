"""Attention rows as tensors: softmax, the row KL with its own gradient, coarse teachers, sums of squared gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import LargestOutput
from torch import Tensor

from seekr_peft.attention import row_math as rows_module
from seekr_peft.attention.row_math import (
    RowInputs,
    RowMask,
    TeacherRows,
    gradient_squares,
    gradient_squares_causal,
    gradient_squares_full,
    head_keys,
    kl_of_rows,
    row_kl,
    row_probabilities,
    row_weights,
)

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
    logits = 2 * torch.randn(shape, dtype=rows_module.compute_dtype(inputs.query))
    return torch.softmax(logits.masked_fill(~inputs.mask.allowed, float("-inf")), dim=-1).nan_to_num(0)


def slow_student(inputs: RowInputs) -> Tensor:
    """Softmax of q k^T by plain autograd."""
    logits = torch.einsum("bhqd,bhkd->bhqk", inputs.query, inputs.key) * inputs.scaling
    if inputs.mask.bias is not None:
        logits = logits + inputs.mask.bias
    return torch.softmax(logits.masked_fill(~inputs.mask.allowed, float("-inf")), dim=-1)


def slow_full_kl(inputs: RowInputs, teacher: Tensor, weights: Tensor) -> Tensor:
    """torch's own kl_div of each row, weighted."""
    student = slow_student(inputs)
    # log(1) where masked, so that torch's 0 * log q is 0 and not NaN.
    log_student = torch.where(inputs.mask.allowed, student, 1).log()
    per_row = torch.nn.functional.kl_div(log_student, teacher, reduction="none").sum(dim=-1)
    return (per_row * weights).sum()


def slow_coarse_kl(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Per row: KL between (the teacher's k largest keys, all the others as one bin) of teacher and student."""
    result = torch.zeros(teacher.shape[:-1], dtype=teacher.dtype)
    flat = result.view(-1)
    pairs = zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True)
    for i, (q, p) in enumerate(pairs):
        order = sorted(range(len(p)), key=lambda key: -p[key].item())
        bins = [[key] for key in order[:k]] + [order[k:]]
        for keys in bins:
            p_mass, q_mass = sum(p[key].item() for key in keys), sum(q[key].item() for key in keys)
            if p_mass > 0:
                flat[i] += p_mass * math.log(p_mass / q_mass)
    return result


def gradients(loss: Tensor, inputs: RowInputs) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (inputs.query, inputs.key))


# --- row probabilities ---


def test_a_hand_sized_row_is_the_softmax_of_its_two_logits() -> None:
    inputs = RowInputs(
        query=torch.tensor([[[[2.0]]]]),
        key=torch.tensor([[[[0.0], [1.0]]]]),
        mask=RowMask(torch.ones(1, 1, 1, 2, dtype=torch.bool)),
        real=torch.ones(1, 1, dtype=torch.bool),
        scaling=0.5,
    )
    # Logits 0 and 1.
    torch.testing.assert_close(row_probabilities(inputs), torch.tensor([[[[1 / (1 + math.e), math.e / (1 + math.e)]]]]))


def test_rows_equal_a_softmax_by_einsum_and_sum_to_one() -> None:
    inputs = make_inputs()
    rows = row_probabilities(inputs)
    real = inputs.real[:, None, :, None]
    torch.testing.assert_close(rows, torch.where(real, slow_student(inputs), 0), rtol=1e-12, atol=1e-14)
    sums = rows.sum(dim=-1).transpose(1, 2)
    torch.testing.assert_close(sums[inputs.real], torch.ones_like(sums[inputs.real]), rtol=1e-12, atol=0)
    assert (rows[~inputs.mask.allowed.expand_as(rows)] == 0).all()


def test_rows_of_padding_are_exactly_zero_and_give_no_gradient() -> None:
    inputs = make_inputs()
    rows = row_probabilities(inputs)
    assert (rows[0, :, -1] == 0).all() and (rows[1, :, -1].sum(dim=-1) > 0.99).all()
    query_gradient, _ = gradients((rows * torch.randn_like(rows)).sum(), inputs)
    assert (query_gradient[0, :, -1] == 0).all() and (query_gradient[1, :, -1] != 0).any()


def test_a_row_that_may_look_nowhere_is_zero_with_a_finite_gradient() -> None:
    inputs = make_inputs()
    inputs = blind(inputs, (1, slice(None), 2))
    rows = row_probabilities(inputs)
    assert (rows[1, :, 2] == 0).all()
    for gradient in gradients((rows * torch.randn_like(rows)).sum(), inputs):
        assert gradient.isfinite().all() and (gradient != 0).any()


def test_rows_of_bfloat16_are_computed_in_float32() -> None:
    inputs = make_inputs(torch.bfloat16, bias=False)
    rows = row_probabilities(inputs)
    wide = row_probabilities(replace(inputs, query=inputs.query.double(), key=inputs.key.double()))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), wide, rtol=1e-5, atol=1e-7)


# --- weights ---


def test_weights_are_a_mean_over_heads_and_real_queries_per_sample_then_over_samples() -> None:
    real = torch.tensor([[True, True, False, False], [True, True, True, True]])
    weights = row_weights(real, n_heads=3)
    assert weights.shape == (2, 3, 4)
    expected = torch.tensor([[1 / 12, 1 / 12, 0, 0], [1 / 24, 1 / 24, 1 / 24, 1 / 24]])
    torch.testing.assert_close(weights, expected[:, None].expand(-1, 3, -1))
    assert weights.sum().item() == pytest.approx(1)


def test_weights_of_a_sample_of_padding_only_are_zero() -> None:
    weights = row_weights(torch.tensor([[False, False]]), n_heads=2)
    assert (weights == 0).all()


# --- the row KL ---


def hand_sized() -> tuple[RowInputs, TeacherRows]:
    """One row over two keys: student (1/4, 3/4), teacher (1/2, 1/2)."""
    inputs = RowInputs(
        query=torch.tensor([[[[math.log(3.0)]]]], dtype=torch.float64, requires_grad=True),
        key=torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64, requires_grad=True),
        mask=RowMask(torch.ones(1, 1, 1, 2, dtype=torch.bool)),
        real=torch.ones(1, 1, dtype=torch.bool),
        scaling=1.0,
    )
    return inputs, TeacherRows.from_dense(torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64))


def test_the_kl_of_one_row_over_two_keys_is_the_number_worked_by_hand() -> None:
    inputs, teacher = hand_sized()
    loss = row_kl(inputs, teacher)
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75), teacher first.
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-14)
    query_gradient, key_gradient = gradients(loss, inputs)
    # d/ds = student - teacher = (-1/4, 1/4); dq = sum of d/ds * k, dk = d/ds * q.
    assert query_gradient.flatten().tolist() == pytest.approx([0.25], rel=1e-14)
    assert key_gradient.flatten().tolist() == pytest.approx([-math.log(3) / 4, math.log(3) / 4], rel=1e-14)


@pytest.mark.parametrize("bias", [False, True])
def test_row_kl_equals_softmax_and_kl_div_in_value_and_gradient(bias: bool) -> None:
    inputs = make_inputs(bias=bias)
    teacher, weights = make_teacher(inputs), row_weights(inputs.real, HEADS).double()
    expected, loss = slow_full_kl(inputs, teacher, weights), row_kl(inputs, TeacherRows.from_dense(teacher))
    assert loss.item() > 0.1  # a fixture whose KL is nothing would prove nothing
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, slow in zip(gradients(3 * loss, inputs), gradients(3 * expected, inputs), strict=True):
        assert slow.norm() > 1e-2
        torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_row_kl_passes_gradcheck(top_k: int | None) -> None:
    inputs = make_inputs(n_queries=3, n_keys=6, dim=4)
    teacher = TeacherRows.from_dense(make_teacher(inputs), top_k)
    weights = torch.rand(BATCH, HEADS, 3, dtype=torch.float64)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return row_kl(replace(inputs, query=query, key=key), teacher, weights)

    assert torch.autograd.gradcheck(loss, (inputs.query, inputs.key))


@pytest.mark.parametrize("top_k", [1, 3, KEYS - 1])
def test_the_coarse_kl_merges_the_keys_that_are_not_stored_into_one_bin(top_k: int) -> None:
    inputs = make_inputs()
    teacher, weights = make_teacher(inputs), torch.rand(BATCH, HEADS, QUERIES, dtype=torch.float64)
    expected = (slow_coarse_kl(slow_student(inputs), teacher, top_k) * weights).sum()
    loss = row_kl(inputs, TeacherRows.from_dense(teacher, top_k), weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_coarse_kl_grows_with_the_stored_keys_up_to_the_full_kl() -> None:
    inputs = make_inputs()
    teacher = make_teacher(inputs)
    losses = [row_kl(inputs, TeacherRows.from_dense(teacher, k)).item() for k in range(1, KEYS + 1)]
    full = row_kl(inputs, TeacherRows.from_dense(teacher)).item()
    assert losses == sorted(losses) and losses[0] < 0.9 * full
    assert losses[-1] == full


@pytest.mark.parametrize("top_k", [None, 2, KEYS])
def test_identical_rows_have_no_kl_and_no_gradient(top_k: int | None) -> None:
    inputs = make_inputs()
    loss = row_kl(inputs, TeacherRows.from_dense(row_probabilities(inputs).detach(), top_k))
    assert loss.item() == pytest.approx(0, abs=1e-14)
    for gradient in gradients(loss, inputs):
        assert gradient.abs().max() < 1e-15


def test_float32_rows_shorter_than_k_have_exactly_no_remaining_mass() -> None:
    """A causal query near the start has fewer keys than k; rounding must not look like a mass of other keys."""
    inputs = make_inputs(torch.float32, n_queries=64, n_keys=64, masked=0.0)
    inputs = replace(inputs, mask=RowMask(torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()))
    rows = row_probabilities(replace(inputs, real=torch.ones_like(inputs.real))).detach()
    teacher = TeacherRows.from_dense(rows, 16)
    assert (teacher.remaining[:, :, :16] == 0).all() and (teacher.remaining[:, :, 16:] > 0).all()
    assert row_kl(inputs, teacher).item() == pytest.approx(0, abs=2e-7)


@pytest.mark.parametrize("function", ["row_kl", "kl_of_rows"])
def test_an_entry_of_probability_zero_is_absent_whatever_its_index(function: str) -> None:
    """Batches pad the stored entries with index 0 and probability 0, and key 0 may be among the others or stored."""
    inputs = make_inputs()
    teacher, weights = make_teacher(inputs), row_weights(inputs.real, HEADS).double()
    stored = TeacherRows.from_dense(teacher, 3)
    has_key_0 = (stored.indices == 0).any(dim=-1)
    assert has_key_0.any() and not has_key_0.all()
    padded = TeacherRows(
        torch.nn.functional.pad(stored.indices, (0, 2)),
        torch.nn.functional.pad(stored.probabilities, (0, 2)),
        stored.remaining,
    )

    def loss(rows: TeacherRows) -> Tensor:
        if function == "row_kl":
            return row_kl(inputs, rows, weights)
        return kl_of_rows(row_probabilities(inputs), rows, weights)

    torch.testing.assert_close(loss(padded), loss(stored), rtol=1e-13, atol=0)
    for mine, slow in zip(gradients(loss(padded), inputs), gradients(loss(stored), inputs), strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("top_k", [None, 3])
def test_kl_of_materialised_rows_equals_row_kl(top_k: int | None) -> None:
    inputs = make_inputs()
    teacher, weights = make_teacher(inputs), row_weights(inputs.real, HEADS).double()
    stored = TeacherRows.from_dense(teacher, top_k)
    expected, loss = row_kl(inputs, stored, weights), kl_of_rows(row_probabilities(inputs), stored, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, other in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("chunk_bytes", [1, 2 * BATCH * HEADS * KEYS * 8])
def test_walking_the_queries_in_chunks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, top_k: int | None, chunk_bytes: int
) -> None:
    inputs = make_inputs()
    stored = TeacherRows.from_dense(make_teacher(inputs), top_k)
    whole = row_kl(inputs, stored)
    expected = gradients(whole, inputs)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", chunk_bytes)
    assert len(list(rows_module._query_chunks(inputs))) == (QUERIES if chunk_bytes == 1 else 3)
    chunked = row_kl(inputs, stored)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    for mine, other in zip(gradients(chunked, inputs), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("function", ["row_kl", "kl_of_rows"])
def test_rows_without_weight_influence_nothing_even_if_they_are_nan(function: str, top_k: int | None) -> None:
    inputs = make_inputs()
    stored = TeacherRows.from_dense(make_teacher(inputs), top_k)
    weights = torch.rand(BATCH, HEADS, QUERIES, dtype=torch.float64)
    weights[1, :, 3] = 0

    def loss(inputs: RowInputs, teacher: TeacherRows) -> Tensor:
        if function == "row_kl":
            return row_kl(inputs, teacher, weights)
        return kl_of_rows(slow_student(inputs), teacher, weights)

    expected = loss(inputs, stored)
    clean = gradients(expected, inputs)
    for garbage in (float("nan"), float("inf"), -7.0):
        spoilt = TeacherRows(stored.indices, stored.probabilities.clone(), stored.remaining.clone())
        spoilt.probabilities[1, :, 3] = garbage
        spoilt.remaining[1, :, 3] = garbage
        query = inputs.query.detach().clone()
        if function == "row_kl":  # materialised rows carry no NaN: their padding is already 0
            query[1, :, 3] = garbage
        assert inputs.mask.bias is not None
        bias = inputs.mask.bias.repeat(BATCH, 1, 1, 1)
        if function == "row_kl":
            bias[1, :, 3] = garbage
        dirty = replace(inputs, query=query.requires_grad_(), mask=RowMask(inputs.mask.allowed, bias))
        value = loss(dirty, spoilt)
        assert value.item() == expected.item()
        query_gradient, key_gradient = gradients(value, dirty)
        assert (query_gradient[1, :, 3] == 0).all()
        torch.testing.assert_close(query_gradient, clean[0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(key_gradient, clean[1], rtol=1e-12, atol=1e-15)


def test_padding_has_no_weight_by_default() -> None:
    inputs = make_inputs()
    teacher = make_teacher(inputs)
    loss = row_kl(inputs, TeacherRows.from_dense(teacher))
    teacher[0, :, -1] = float("nan")
    assert row_kl(inputs, TeacherRows.from_dense(teacher)).item() == loss.item()
    teacher[1, :, -1] = float("nan")
    assert not row_kl(inputs, TeacherRows.from_dense(teacher)).isfinite()


def test_a_nan_in_a_row_that_counts_is_not_hidden() -> None:
    inputs = make_inputs()
    teacher = TeacherRows.from_dense(make_teacher(inputs))
    query = inputs.query.detach().clone()
    query[1, 0, 2] = float("nan")
    broken = replace(inputs, query=query.requires_grad_())
    loss = row_kl(broken, teacher)
    assert loss.isnan()
    assert gradients(loss, broken)[0][1, 0, 2].isnan().all()


def test_no_gradient_reaches_the_teacher() -> None:
    inputs = make_inputs()
    teacher = make_teacher(inputs).requires_grad_()
    loss = row_kl(inputs, TeacherRows.from_dense(teacher, 4))
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_row_that_may_look_nowhere_counts_for_nothing(top_k: int | None) -> None:
    inputs = make_inputs()
    stored = TeacherRows.from_dense(make_teacher(inputs), top_k)
    weights = torch.rand(BATCH, HEADS, QUERIES, dtype=torch.float64)
    without = weights.clone()
    without[1, :, 2] = 0
    expected = row_kl(inputs, stored, without)
    wanted = gradients(expected, inputs)
    inputs = blind(inputs, (1, slice(None), 2))
    loss = row_kl(inputs, stored, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for mine, other in zip(gradients(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


def test_a_batch_in_which_no_row_counts_gives_zero_and_a_graph() -> None:
    inputs = make_inputs()
    inputs = blind(inputs, slice(None))
    loss = row_kl(inputs, TeacherRows.from_dense(make_teacher(inputs), 3))
    assert loss.item() == 0
    for gradient in gradients(loss, inputs):
        assert (gradient == 0).all()


def test_bfloat16_inputs_get_finite_gradients_in_bfloat16_near_the_exact_ones() -> None:
    inputs = make_inputs(torch.bfloat16, bias=False)
    teacher = make_teacher(inputs)
    assert teacher.dtype == torch.float32
    loss = row_kl(inputs, TeacherRows.from_dense(teacher, 4))
    assert loss.dtype == torch.float32
    wide = replace(
        inputs,
        query=inputs.query.detach().double().requires_grad_(),
        key=inputs.key.detach().double().requires_grad_(),
    )
    exact = row_kl(wide, TeacherRows.from_dense(teacher.double(), 4))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for mine, other in zip(gradients(loss, inputs), gradients(exact, wide), strict=True):
        assert mine.dtype == torch.bfloat16 and mine.isfinite().all()
        torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=1e-6)


def test_a_student_logit_far_below_the_others_gives_a_finite_kl() -> None:
    """The student's probability underflows; its logarithm does not."""
    inputs, teacher = hand_sized()
    inputs = replace(inputs, query=torch.tensor([[[[2000.0]]]], dtype=torch.float64, requires_grad=True))
    loss = row_kl(inputs, teacher)
    assert loss.item() == pytest.approx(0.5 * 2000 - math.log(2), rel=1e-12)
    assert gradients(loss, inputs)[0].item() == pytest.approx(0.5)


def test_float16_gradients_survive_until_the_loss_scale_multiplies_them() -> None:
    """Those of a mean over many rows lie below float16's smallest number."""
    inputs = make_inputs(torch.float16, bias=False)
    teacher = TeacherRows.from_dense(make_teacher(inputs), 4)
    weights, scale = torch.full((BATCH, HEADS, QUERIES), 1e-9), 2.0**24
    wide = replace(
        inputs,
        query=inputs.query.detach().double().requires_grad_(),
        key=inputs.key.detach().double().requires_grad_(),
    )
    found = gradients(scale * row_kl(inputs, teacher, weights), inputs)
    exact = gradients(scale * row_kl(wide, teacher, weights), wide)
    for mine, other in zip(found, exact, strict=True):
        assert mine.dtype == torch.float16 and other.abs().max() > 1e-4
        torch.testing.assert_close(mine.double(), other, rtol=2e-2, atol=1e-6)


def test_nothing_as_large_as_the_rows_is_kept_for_the_backward() -> None:
    inputs = make_inputs(batch=1, heads=2, n_queries=50, n_keys=70, dim=3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        row_kl(inputs, TeacherRows.from_dense(make_teacher(inputs), 4))
    assert {tuple(tensor.shape) for tensor in kept} >= {(1, 2, 50, 3), (1, 2, 70, 3)}
    assert max(tensor.numel() for tensor in kept) == 2 * 70 * 3 < 2 * 50 * 70


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_through_products", lambda *args: pytest.fail("a gradient was made"))
    inputs = make_inputs()
    teacher = TeacherRows.from_dense(make_teacher(inputs), 4)
    with torch.no_grad():
        value = row_kl(inputs, teacher)
    constant = replace(inputs, query=inputs.query.detach(), key=inputs.key.detach())
    assert value.item() == row_kl(constant, teacher).item() > 0


def test_the_graph_can_be_walked_twice_with_the_same_gradients() -> None:
    inputs = make_inputs()
    loss = row_kl(inputs, TeacherRows.from_dense(make_teacher(inputs), 4))
    first = torch.autograd.grad(2 * loss, (inputs.query, inputs.key), retain_graph=True)
    for once, again in zip(first, gradients(loss, inputs), strict=True):
        torch.testing.assert_close(once, 2 * again, rtol=1e-14, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    n_queries=st.integers(1, 6),
    n_keys=st.integers(1, 9),
    dim=st.integers(1, 5),
    top_k=st.integers(1, 10),
    masked=st.sampled_from([0.0, 0.4, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_row_kl_equals_its_slow_definition_for_any_shape_mask_and_k(
    batch: int,
    groups: int,
    kv_heads: int,
    n_queries: int,
    n_keys: int,
    dim: int,
    top_k: int,
    masked: float,
    seed: int,
) -> None:
    """Under grouped-query attention: the gradient flows through ``head_keys`` to the keys that heads share."""
    torch.manual_seed(seed)
    n_heads = groups * kv_heads
    heads = torch.randperm(n_heads)[: max(1, n_heads - 1)].sort().values
    sizes = {"batch": batch, "heads": len(heads), "n_queries": n_queries, "n_keys": n_keys, "dim": dim}
    inputs = make_inputs(masked=masked, **sizes)
    shared_key = torch.randn(batch, kv_heads, n_keys, dim, dtype=torch.float64, requires_grad=True)
    teacher, weights = make_teacher(inputs), torch.rand(batch, len(heads), n_queries, dtype=torch.float64)

    inputs = replace(inputs, key=head_keys(shared_key, heads, n_heads))
    loss = row_kl(inputs, TeacherRows.from_dense(teacher, top_k), weights)
    slow_key = torch.stack([shared_key[:, head // groups] for head in heads.tolist()], dim=1)
    slow = replace(inputs, key=slow_key)
    expected = (slow_coarse_kl(slow_student(slow).detach(), teacher, top_k) * weights).sum()
    full = slow_full_kl(slow, teacher, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert -1e-12 <= loss.item() <= full.item() + 1e-12
    if top_k >= n_keys:
        torch.testing.assert_close(loss, full, rtol=1e-9, atol=1e-12)
        for leaf in (inputs.query, shared_key):
            (mine,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            (other,) = torch.autograd.grad(full, leaf, retain_graph=True)
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


# --- teacher rows ---


def test_from_dense_keeps_the_largest_entries_and_the_mass_of_the_others() -> None:
    teacher = TeacherRows.from_dense(torch.tensor([[[[0.1, 0.4, 0.2, 0.3]]]], dtype=torch.float64), top_k=2)
    assert teacher.indices.tolist() == [[[[1, 3]]]]
    assert teacher.probabilities.tolist() == [[[[0.4, 0.3]]]]
    assert teacher.remaining.flatten().tolist() == pytest.approx([0.3])


def test_from_dense_that_covers_every_key_is_the_row_itself() -> None:
    rows = torch.softmax(torch.randn(2, 3, 4, 5), dim=-1)
    for top_k in (None, 5, 9):
        teacher = TeacherRows.from_dense(rows, top_k)
        assert torch.equal(torch.zeros_like(rows).scatter(-1, teacher.indices, teacher.probabilities), rows)
        assert (teacher.remaining == 0).all()


def test_moving_a_teacher_keeps_its_indices_int64() -> None:
    teacher = TeacherRows.from_dense(torch.softmax(torch.randn(1, 1, 2, 5), dim=-1), 3)
    moved = teacher.to(torch.device("cpu"), torch.float64)
    assert moved.indices.dtype == torch.int64
    assert moved.probabilities.dtype == moved.remaining.dtype == torch.float64


def test_head_keys_gives_each_query_head_the_key_head_of_its_group() -> None:
    key = torch.arange(2.0)[None, :, None, None].expand(1, 2, 3, 4)
    assert head_keys(key, torch.tensor([0, 2, 3, 5]), n_heads=6)[0, :, 0, 0].tolist() == [0, 0, 1, 1]


# --- sums of squared gradients ---


def slow_squares(output_gradient: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Dense dO V^T, masked, squared and summed."""
    value = torch.stack([value[:, head // 2] for head in range(output_gradient.shape[1])], dim=1)
    attention_gradient = torch.einsum("bhqd,bhkd->bhqk", output_gradient, value)
    return (attention_gradient * allowed).square().sum(dim=(-1, -2))


def output_gradient_and_value(length: int) -> tuple[Tensor, Tensor]:
    """Four query heads over two value heads."""
    gradient = torch.randn(3, 4, length, DIM, dtype=torch.float64)
    return gradient, torch.randn(3, 2, length, DIM, dtype=torch.float64)


def test_gradient_squares_of_a_hand_sized_case() -> None:
    gradient = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]])
    value = torch.tensor([[[[1.0, 1.0], [0.0, 5.0]]]])
    # dO V^T = [[3, 10], [3, 0]]
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert gradient_squares(gradient, value, everything).item() == 9 + 100 + 9
    assert gradient_squares(gradient, value, everything.tril()).item() == 9 + 9
    assert gradient_squares_full(gradient, value).item() == 9 + 100 + 9
    assert gradient_squares_causal(gradient, value).item() == 9 + 9


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 3 * 4 * 13 * 8, 2**25])
def test_gradient_squares_equal_the_masked_dense_product(chunk_bytes: int) -> None:
    gradient, value = output_gradient_and_value(13)
    for allowed in (torch.rand(3, 1, 13, 13) < 0.6, torch.rand(1, 1, 1, 13) < 0.6):
        mine = gradient_squares(gradient, value, allowed, chunk_bytes)
        torch.testing.assert_close(mine, slow_squares(gradient, value, allowed), rtol=1e-12, atol=0)


@pytest.mark.parametrize("block", [1, 4, 5, 12, 13, 64])
def test_prefix_grams_equal_the_causal_dense_product(block: int) -> None:
    gradient, value = output_gradient_and_value(13)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    mine = gradient_squares_causal(gradient, value, block)
    torch.testing.assert_close(mine, slow_squares(gradient, value, causal), rtol=1e-12, atol=0)


def test_the_trace_of_two_grams_equals_the_full_dense_product() -> None:
    gradient, value = output_gradient_and_value(13)
    expected = slow_squares(gradient, value, torch.ones(13, 13, dtype=torch.bool))
    torch.testing.assert_close(gradient_squares_full(gradient, value), expected, rtol=1e-12, atol=0)


def test_bfloat16_gradients_are_squared_in_float32() -> None:
    gradient, value = (tensor.bfloat16() for tensor in output_gradient_and_value(13))
    causal = torch.ones(13, 13, dtype=torch.bool).tril()
    mine = gradient_squares_causal(gradient, value, block=4)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(
        mine.double(), slow_squares(gradient.double(), value.double(), causal), rtol=1e-4, atol=0
    )


# --- memory ---


def test_the_measure_of_memory_sees_a_square_tensor() -> None:
    with LargestOutput() as largest:
        x = torch.randn(50, 2)
        (x @ x.T).sum()
    assert largest.numel == 2500


@pytest.mark.parametrize("top_k", [None, 8])
def test_row_kl_never_makes_a_square_tensor(top_k: int | None) -> None:
    length, n_queries = 640, 6
    inputs = make_inputs(torch.float32, bias=False, batch=1, heads=4, n_queries=n_queries, n_keys=length, dim=8)
    teacher = TeacherRows.from_dense(make_teacher(inputs), top_k)
    with LargestOutput() as largest:
        gradients(row_kl(inputs, teacher), inputs)
        row_probabilities(inputs).sum().backward()
    assert 4 * n_queries * length <= largest.numel < length * length


def test_a_long_list_of_queries_is_walked_in_chunks_of_the_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 256
    inputs = make_inputs(torch.float32, bias=False, batch=1, heads=4, n_queries=length, n_keys=length, dim=8)
    inputs = replace(inputs, mask=RowMask(torch.ones(1, 1, 1, length, dtype=torch.bool)))
    teacher = TeacherRows.from_dense(torch.full((1, 4, length, length), 1 / length), 8)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 4 * 4 * length * 16)  # 16 queries of 4 heads
    with LargestOutput() as largest:
        gradients(row_kl(inputs, teacher), inputs)
    assert largest.numel == 4 * 16 * length < length * length


@pytest.mark.parametrize("every", ["causal", "full"])
def test_sums_over_every_query_never_make_a_square_tensor(every: str) -> None:
    length = 640
    gradient, value = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    with LargestOutput() as largest:
        gradient_squares_causal(gradient, value) if every == "causal" else gradient_squares_full(gradient, value)
    assert 0 < largest.numel < length * length / 2
