"""Attention rows as tensors: the softmax and the weights of a mean."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.rows import blind, gradients, make_inputs, slow_student

from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.rows import RowInputs, row_probabilities, row_weights

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
