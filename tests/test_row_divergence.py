"""The KL of two models' attention rows, with its own gradient and coarse teachers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import BATCH, HEADS, KEYS, QUERIES, blind, gradients, make_inputs, make_teacher, slow_student
from torch import Tensor

from seekr_peft.attention import row_divergence
from seekr_peft.attention import rows as rows_module
from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.pairs import head_keys
from seekr_peft.attention.row_divergence import kl_of_rows, row_kl
from seekr_peft.attention.rows import RowInputs, row_probabilities, row_weights
from seekr_peft.sparse import SparseDistribution


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


def hand_sized() -> tuple[RowInputs, SparseDistribution]:
    """One row over two keys: student (1/4, 3/4), teacher (1/2, 1/2)."""
    inputs = RowInputs(
        query=torch.tensor([[[[math.log(3.0)]]]], dtype=torch.float64, requires_grad=True),
        key=torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64, requires_grad=True),
        mask=RowMask(torch.ones(1, 1, 1, 2, dtype=torch.bool)),
        real=torch.ones(1, 1, dtype=torch.bool),
        scaling=1.0,
    )
    return inputs, SparseDistribution.from_dense(torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64))


# --- the row KL ---


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
    expected, loss = slow_full_kl(inputs, teacher, weights), row_kl(inputs, SparseDistribution.from_dense(teacher))
    assert loss.item() > 0.1  # a fixture whose KL is nothing would prove nothing
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, slow in zip(gradients(3 * loss, inputs), gradients(3 * expected, inputs), strict=True):
        assert slow.norm() > 1e-2
        torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_row_kl_passes_gradcheck(top_k: int | None) -> None:
    inputs = make_inputs(n_queries=3, n_keys=6, dim=4)
    teacher = SparseDistribution.from_dense(make_teacher(inputs), top_k)
    weights = torch.rand(BATCH, HEADS, 3, dtype=torch.float64)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return row_kl(replace(inputs, query=query, key=key), teacher, weights)

    assert torch.autograd.gradcheck(loss, (inputs.query, inputs.key))


@pytest.mark.parametrize("top_k", [1, 3, KEYS - 1])
def test_the_coarse_kl_merges_the_keys_that_are_not_stored_into_one_bin(top_k: int) -> None:
    inputs = make_inputs()
    teacher, weights = make_teacher(inputs), torch.rand(BATCH, HEADS, QUERIES, dtype=torch.float64)
    expected = (slow_coarse_kl(slow_student(inputs), teacher, top_k) * weights).sum()
    loss = row_kl(inputs, SparseDistribution.from_dense(teacher, top_k), weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_coarse_kl_grows_with_the_stored_keys_up_to_the_full_kl() -> None:
    inputs = make_inputs()
    teacher = make_teacher(inputs)
    losses = [row_kl(inputs, SparseDistribution.from_dense(teacher, k)).item() for k in range(1, KEYS + 1)]
    full = row_kl(inputs, SparseDistribution.from_dense(teacher)).item()
    assert losses == sorted(losses) and losses[0] < 0.9 * full
    assert losses[-1] == full


@pytest.mark.parametrize("top_k", [None, 2, KEYS])
def test_identical_rows_have_no_kl_and_no_gradient(top_k: int | None) -> None:
    inputs = make_inputs()
    loss = row_kl(inputs, SparseDistribution.from_dense(row_probabilities(inputs).detach(), top_k))
    assert loss.item() == pytest.approx(0, abs=1e-14)
    for gradient in gradients(loss, inputs):
        assert gradient.abs().max() < 1e-15


def test_float32_rows_shorter_than_k_have_exactly_no_remaining_mass() -> None:
    """A causal query near the start has fewer keys than k; rounding must not look like a mass of other keys."""
    inputs = make_inputs(torch.float32, n_queries=64, n_keys=64, masked=0.0)
    inputs = replace(inputs, mask=RowMask(torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()))
    rows = row_probabilities(replace(inputs, real=torch.ones_like(inputs.real))).detach()
    teacher = SparseDistribution.from_dense(rows, 16)
    assert (teacher.remaining[:, :, :16] == 0).all() and (teacher.remaining[:, :, 16:] > 0).all()
    assert row_kl(inputs, teacher).item() == pytest.approx(0, abs=2e-7)


@pytest.mark.parametrize("function", ["row_kl", "kl_of_rows"])
def test_an_entry_of_probability_zero_is_absent_whatever_its_index(function: str) -> None:
    """Batches pad the stored entries with index 0 and probability 0, and key 0 may be among the others or stored."""
    inputs = make_inputs()
    teacher, weights = make_teacher(inputs), row_weights(inputs.real, HEADS).double()
    stored = SparseDistribution.from_dense(teacher, 3)
    has_key_0 = (stored.indices == 0).any(dim=-1)
    assert has_key_0.any() and not has_key_0.all()
    padded = SparseDistribution(
        torch.nn.functional.pad(stored.indices, (0, 2)),
        torch.nn.functional.pad(stored.probabilities, (0, 2)),
        stored.remaining,
    )

    def loss(rows: SparseDistribution) -> Tensor:
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
    stored = SparseDistribution.from_dense(teacher, top_k)
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
    stored = SparseDistribution.from_dense(make_teacher(inputs), top_k)
    whole = row_kl(inputs, stored)
    expected = gradients(whole, inputs)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", chunk_bytes)
    assert len(list(rows_module.query_chunks(inputs))) == (QUERIES if chunk_bytes == 1 else 3)
    chunked = row_kl(inputs, stored)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    for mine, other in zip(gradients(chunked, inputs), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("function", ["row_kl", "kl_of_rows"])
def test_rows_without_weight_influence_nothing_even_if_they_are_nan(function: str, top_k: int | None) -> None:
    inputs = make_inputs()
    stored = SparseDistribution.from_dense(make_teacher(inputs), top_k)
    weights = torch.rand(BATCH, HEADS, QUERIES, dtype=torch.float64)
    weights[1, :, 3] = 0

    def loss(inputs: RowInputs, teacher: SparseDistribution) -> Tensor:
        if function == "row_kl":
            return row_kl(inputs, teacher, weights)
        return kl_of_rows(slow_student(inputs), teacher, weights)

    expected = loss(inputs, stored)
    clean = gradients(expected, inputs)
    for garbage in (float("nan"), float("inf"), -7.0):
        spoilt = SparseDistribution(stored.indices, stored.probabilities.clone(), stored.remaining.clone())
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
    loss = row_kl(inputs, SparseDistribution.from_dense(teacher))
    teacher[0, :, -1] = float("nan")
    assert row_kl(inputs, SparseDistribution.from_dense(teacher)).item() == loss.item()
    teacher[1, :, -1] = float("nan")
    assert not row_kl(inputs, SparseDistribution.from_dense(teacher)).isfinite()


def test_a_nan_in_a_row_that_counts_is_not_hidden() -> None:
    inputs = make_inputs()
    teacher = SparseDistribution.from_dense(make_teacher(inputs))
    query = inputs.query.detach().clone()
    query[1, 0, 2] = float("nan")
    broken = replace(inputs, query=query.requires_grad_())
    loss = row_kl(broken, teacher)
    assert loss.isnan()
    assert gradients(loss, broken)[0][1, 0, 2].isnan().all()


def test_no_gradient_reaches_the_teacher() -> None:
    inputs = make_inputs()
    teacher = make_teacher(inputs).requires_grad_()
    loss = row_kl(inputs, SparseDistribution.from_dense(teacher, 4))
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_row_that_may_look_nowhere_counts_for_nothing(top_k: int | None) -> None:
    inputs = make_inputs()
    stored = SparseDistribution.from_dense(make_teacher(inputs), top_k)
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
    loss = row_kl(inputs, SparseDistribution.from_dense(make_teacher(inputs), 3))
    assert loss.item() == 0
    for gradient in gradients(loss, inputs):
        assert (gradient == 0).all()


def test_bfloat16_inputs_get_finite_gradients_in_bfloat16_near_the_exact_ones() -> None:
    inputs = make_inputs(torch.bfloat16, bias=False)
    teacher = make_teacher(inputs)
    assert teacher.dtype == torch.float32
    loss = row_kl(inputs, SparseDistribution.from_dense(teacher, 4))
    assert loss.dtype == torch.float32
    wide = replace(
        inputs,
        query=inputs.query.detach().double().requires_grad_(),
        key=inputs.key.detach().double().requires_grad_(),
    )
    exact = row_kl(wide, SparseDistribution.from_dense(teacher.double(), 4))
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
    teacher = SparseDistribution.from_dense(make_teacher(inputs), 4)
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
        row_kl(inputs, SparseDistribution.from_dense(make_teacher(inputs), 4))
    assert {tuple(tensor.shape) for tensor in kept} >= {(1, 2, 50, 3), (1, 2, 70, 3)}
    assert max(tensor.numel() for tensor in kept) == 2 * 70 * 3 < 2 * 50 * 70


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_divergence, "_through_products", lambda *args: pytest.fail("a gradient was made"))
    inputs = make_inputs()
    teacher = SparseDistribution.from_dense(make_teacher(inputs), 4)
    with torch.no_grad():
        value = row_kl(inputs, teacher)
    constant = replace(inputs, query=inputs.query.detach(), key=inputs.key.detach())
    assert value.item() == row_kl(constant, teacher).item() > 0


def test_the_graph_can_be_walked_twice_with_the_same_gradients() -> None:
    inputs = make_inputs()
    loss = row_kl(inputs, SparseDistribution.from_dense(make_teacher(inputs), 4))
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
    loss = row_kl(inputs, SparseDistribution.from_dense(teacher, top_k), weights)
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
