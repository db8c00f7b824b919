"""Packed rows against their slow, obvious meaning: a dictionary of entries for each row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from seekr_peft.attention import TeacherRows
from seekr_peft.attention.rows import keep_largest
from seekr_peft.memory.codec import LOG_STEP, SparseRows, pack, unpack

WIDTHS = st.sampled_from([1, 3, 200, 255, 256, 257, 511, 5000, 40_000, 152_000])
DTYPES = ("uint8", "float16", "float32")
GAP_DTYPES = (torch.uint8, torch.int16)
ERROR = {"uint8": LOG_STEP, "float16": 1e-3, "float32": 1e-6}


@st.composite
def sparse_rows(draw: st.DrawFn) -> SparseRows:
    """Rows with any number of entries, none among them, in any order, over narrow and wide index ranges."""
    width, n_rows, k = draw(WIDTHS), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    k = min(k, width)
    indices = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(n_rows)])
    probabilities = torch.rand(n_rows, k, generator=generator) + 1e-3
    probabilities[torch.rand(n_rows, k, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = 0
    remaining = torch.rand(n_rows, generator=generator)
    total = probabilities.sum(-1) + remaining
    return SparseRows(indices, probabilities / total[:, None], remaining / total)


def entries(rows: SparseRows) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(indices, probabilities, strict=True) if p > 0}
        for indices, probabilities in zip(rows.indices, rows.probabilities, strict=True)
    ]


@given(sparse_rows(), st.sampled_from(DTYPES), st.sampled_from(GAP_DTYPES))
def test_rows_come_back_as_they_were_packed(rows: SparseRows, dtype: str, gap_dtype: torch.dtype) -> None:
    back = unpack(pack(rows, dtype, gap_dtype))
    expected = entries(rows)
    assert [set(row) for row in entries(back)] == [set(row) for row in expected]
    for found, wanted, left in zip(entries(back), expected, back.remaining.tolist(), strict=True):
        assert list(found) == sorted(found)
        for index, value in wanted.items():
            assert found[index] == pytest.approx(value, rel=2 * ERROR[dtype], abs=3e-4 if dtype != "float32" else 1e-6)
        if found:
            assert sum(found.values()) + left == pytest.approx(1, abs=1e-5)
    assert back.remaining.tolist() == pytest.approx(rows.remaining.tolist(), abs=1e-3)


def test_a_gap_takes_one_place_and_one_more_for_every_255_or_32767_passed_over() -> None:
    def places(*indices: int, gap_dtype: torch.dtype = torch.uint8) -> list[int]:
        rows = SparseRows(torch.tensor([indices]), torch.full((1, len(indices)), 0.1), torch.tensor([0.5]))
        packed = pack(rows, "uint8", gap_dtype)
        assert packed.gaps.dtype == gap_dtype
        assert packed.sizes.tolist() == [len(packed.gaps)]
        return packed.gaps.tolist()

    assert places(0, 1, 5) == [0, 0, 3]
    assert places(254) == [254]
    assert places(255) == [255, 0]
    assert places(3, 1000) == [3, 255, 255, 255, 231]
    assert places(3, 1000, gap_dtype=torch.int16) == [3, 996]
    assert places(32_766, 100_000, gap_dtype=torch.int16) == [32_766, 32_767, 32_767, 1699]


def test_what_eight_bits_cannot_tell_from_nothing_joins_the_remaining_mass() -> None:
    rows = SparseRows(torch.tensor([[4, 2]]), torch.tensor([[0.9, 1e-7]]), torch.tensor([0.1 - 1e-7]))
    back = unpack(pack(rows, "uint8", torch.uint8))
    assert entries(back) == [{4: pytest.approx(0.9, abs=1e-4)}]
    assert float(back.remaining) == pytest.approx(0.1, abs=1e-4)


def test_a_row_of_padding_stays_zero() -> None:
    rows = SparseRows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.0, 0.0], [0.4, 0.6]]), torch.zeros(2))
    for dtype in DTYPES:
        back = unpack(pack(rows, dtype, torch.uint8))
        assert not back.probabilities[0].any() and float(back.remaining[0]) == 0.0
        assert not back.remaining.any()


@given(st.integers(2, 400), st.floats(0.3, 4.0), st.integers(0, 10**6))
def test_eight_bits_cost_a_ten_thousandth_of_a_nat(width: int, sharpness: float, seed: int) -> None:
    logits = sharpness * torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    exact = logits.softmax(-1)
    back = unpack(pack(SparseRows(torch.arange(width)[None], exact, torch.zeros(1)), "uint8", torch.uint8))
    kl = 0.0
    for index, value in entries(back)[0].items():
        kl += float(exact[0, index]) * math.log(float(exact[0, index]) / value)
    assert abs(kl) < 5e-4


def kept(rows: TeacherRows) -> Tensor:
    return torch.zeros(3, 4, 40).scatter_add(-1, rows.indices, rows.probabilities)


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_a_row_keeps_the_fewest_entries_that_hold_its_mass(top_k: int, mass: float, seed: int) -> None:
    exact = (3 * torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    rows = TeacherRows.from_dense(exact, top_k, mass)
    for row, found, left in zip(
        exact.reshape(-1, 40), kept(rows).reshape(-1, 40), rows.remaining.flatten(), strict=True
    ):
        ranked = sorted(row.tolist(), reverse=True)
        needed = next((n for n in range(1, 41) if sum(ranked[:n]) >= mass), 40)
        # A sum may round to either side of the mass.
        assert abs(int((found > 0).sum()) - min(top_k, needed)) <= 1
        assert float(left) == pytest.approx(1 - float(found.sum()), abs=1e-5)


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_the_largest_entries_of_all_rows_together_are_kept(per_row: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 2.0, 6.0])[:, None, None]
    layers = {
        layer: TeacherRows.from_dense((scale * torch.randn(3, 4, 40, generator=generator)).softmax(-1), 16)
        for layer in (1, 5)
    }
    found = keep_largest(layers, per_row)
    values = sorted((v for rows in layers.values() for v in kept(rows).flatten().tolist() if v > 0), reverse=True)
    wanted = values[: per_row * 24]
    left = sorted((v for rows in found.values() for v in kept(rows).flatten().tolist() if v > 0), reverse=True)
    assert left == pytest.approx(wanted, rel=1e-6)
    for rows in found.values():
        torch.testing.assert_close(rows.probabilities.sum(-1) + rows.remaining, torch.ones(3, 4))
