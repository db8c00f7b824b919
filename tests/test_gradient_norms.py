"""Sparse distributions, sums of squared gradients, and that none of it ever makes a square tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.rows import DIM, gradients, make_inputs, make_teacher
from support.tiny_models import LargestOutput
from torch import Tensor

from seekr_peft.attention import rows as rows_module
from seekr_peft.attention.gradient_norms import gradient_squares, gradient_squares_causal, gradient_squares_full
from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.pairs import head_keys
from seekr_peft.attention.row_divergence import row_kl
from seekr_peft.attention.rows import row_probabilities
from seekr_peft.sparse import SparseDistribution

# --- teacher rows ---


def test_from_dense_keeps_the_largest_entries_and_the_mass_of_the_others() -> None:
    teacher = SparseDistribution.from_dense(torch.tensor([[[[0.1, 0.4, 0.2, 0.3]]]], dtype=torch.float64), top_k=2)
    assert teacher.indices.tolist() == [[[[1, 3]]]]
    assert teacher.probabilities.tolist() == [[[[0.4, 0.3]]]]
    assert teacher.remaining.flatten().tolist() == pytest.approx([0.3])


def test_from_dense_that_covers_every_key_is_the_row_itself() -> None:
    rows = torch.softmax(torch.randn(2, 3, 4, 5), dim=-1)
    for top_k in (None, 5, 9):
        teacher = SparseDistribution.from_dense(rows, top_k)
        assert torch.equal(torch.zeros_like(rows).scatter(-1, teacher.indices, teacher.probabilities), rows)
        assert (teacher.remaining == 0).all()


def test_moving_a_teacher_keeps_its_indices_int64() -> None:
    teacher = SparseDistribution.from_dense(torch.softmax(torch.randn(1, 1, 2, 5), dim=-1), 3)
    moved = teacher.to(torch.device("cpu"), torch.float64)
    assert moved.indices.dtype == torch.int64
    assert moved.probabilities.dtype == moved.remaining.dtype == torch.float64


def test_head_keys_gives_each_query_head_the_key_head_of_its_group() -> None:
    key = torch.arange(2.0)[None, :, None, None].expand(1, 2, 3, 4)
    assert head_keys(key, torch.tensor([0, 2, 3, 5]), n_heads=6)[0, :, 0, 0].tolist() == [0, 0, 1, 1]


def slow_squares(output_gradient: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Dense dO V^T, masked, squared and summed."""
    value = torch.stack([value[:, head // 2] for head in range(output_gradient.shape[1])], dim=1)
    attention_gradient = torch.einsum("bhqd,bhkd->bhqk", output_gradient, value)
    return (attention_gradient * allowed).square().sum(dim=(-1, -2))


def output_gradient_and_value(length: int) -> tuple[Tensor, Tensor]:
    """Four query heads over two value heads."""
    gradient = torch.randn(3, 4, length, DIM, dtype=torch.float64)
    return gradient, torch.randn(3, 2, length, DIM, dtype=torch.float64)


# --- sums of squared gradients ---


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
    teacher = SparseDistribution.from_dense(make_teacher(inputs), top_k)
    with LargestOutput() as largest:
        gradients(row_kl(inputs, teacher), inputs)
        row_probabilities(inputs).sum().backward()
    assert 4 * n_queries * length <= largest.numel < length * length


def test_a_long_list_of_queries_is_walked_in_chunks_of_the_stated_size(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 256
    inputs = make_inputs(torch.float32, bias=False, batch=1, heads=4, n_queries=length, n_keys=length, dim=8)
    inputs = replace(inputs, mask=RowMask(torch.ones(1, 1, 1, length, dtype=torch.bool)))
    teacher = SparseDistribution.from_dense(torch.full((1, 4, length, length), 1 / length), 8)
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
