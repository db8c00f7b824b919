"""Packed rows against their slow, obvious meaning: a dictionary of entries for each row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seekr_peft.memory.codec import LOG_STEP, pack, unpack
from seekr_peft.sparse import BROADEST, SparseDistribution, sparse_rows

WIDTHS = st.sampled_from([1, 3, 200, 255, 256, 257, 511, 5000, 40_000, 152_000])
DTYPES = ("uint8", "float16", "float32")
GAP_DTYPES = (torch.uint8, torch.int16)
ERROR = {"uint8": LOG_STEP, "float16": 1e-3, "float32": 1e-6}


@st.composite
def drawn_rows(draw: st.DrawFn) -> SparseDistribution:
    """Rows with any number of entries, none among them, in any order, over narrow and wide index ranges."""
    width, n_rows, k = draw(WIDTHS), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    k = min(k, width)
    indices = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(n_rows)])
    probabilities = torch.rand(n_rows, k, generator=generator) + 1e-3
    probabilities[torch.rand(n_rows, k, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = 0
    remaining = torch.rand(n_rows, generator=generator)
    total = probabilities.sum(-1) + remaining
    return SparseDistribution(indices, probabilities / total[:, None], remaining / total)


def entries(rows: SparseDistribution) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(indices, probabilities, strict=True) if p > 0}
        for indices, probabilities in zip(rows.indices, rows.probabilities, strict=True)
    ]


@given(drawn_rows(), st.sampled_from(DTYPES), st.sampled_from(GAP_DTYPES))
def test_rows_come_back_as_they_were_packed(rows: SparseDistribution, dtype: str, gap_dtype: torch.dtype) -> None:
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
        rows = SparseDistribution(torch.tensor([indices]), torch.full((1, len(indices)), 0.1), torch.tensor([0.5]))
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
    rows = SparseDistribution(torch.tensor([[4, 2]]), torch.tensor([[0.9, 1e-7]]), torch.tensor([0.1 - 1e-7]))
    back = unpack(pack(rows, "uint8", torch.uint8))
    assert entries(back) == [{4: pytest.approx(0.9, abs=1e-4)}]
    assert float(back.remaining) == pytest.approx(0.1, abs=1e-4)


def test_a_row_of_padding_stays_zero() -> None:
    rows = SparseDistribution(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.0, 0.0], [0.4, 0.6]]), torch.zeros(2))
    for dtype in DTYPES:
        back = unpack(pack(rows, dtype, torch.uint8))
        assert not back.probabilities[0].any() and float(back.remaining[0]) == 0.0
        assert not back.remaining.any()


@given(st.integers(2, 400), st.floats(0.3, 4.0), st.integers(0, 10**6))
def test_eight_bits_cost_a_ten_thousandth_of_a_nat(width: int, sharpness: float, seed: int) -> None:
    logits = sharpness * torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    exact = logits.softmax(-1)
    back = unpack(pack(SparseDistribution(torch.arange(width)[None], exact, torch.zeros(1)), "uint8", torch.uint8))
    kl = 0.0
    for index, value in entries(back)[0].items():
        kl += float(exact[0, index]) * math.log(float(exact[0, index]) / value)
    assert abs(kl) < 5e-4


def kept(rows: SparseDistribution) -> Tensor:
    return torch.zeros(3, 4, 40, dtype=rows.probabilities.dtype).scatter_add(-1, rows.indices, rows.probabilities)


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_a_row_keeps_the_fewest_entries_that_hold_its_mass(top_k: int, mass: float, seed: int) -> None:
    exact = (3 * torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    rows = SparseDistribution.from_dense(exact, top_k, mass)
    for row, found, left in zip(
        exact.reshape(-1, 40), kept(rows).reshape(-1, 40), rows.remaining.flatten(), strict=True
    ):
        ranked = sorted(row.tolist(), reverse=True)
        needed = next((n for n in range(1, 41) if sum(ranked[:n]) >= mass), 40)
        # A sum may round to either side of the mass.
        assert abs(int((found > 0).sum()) - min(top_k, needed)) <= 1
        assert float(left) == pytest.approx(1 - float(found.sum()), abs=1e-5)


def loss_by_size(row: list[float], widest: int) -> list[float]:
    """The mass that the largest 0, 1, 2 ... entries leave over, and KL(row || these as they are and that mass evenly
    over the others), by hand."""
    ranked = sorted((value for value in row if value > 0), reverse=True)
    found = []
    for size in range(min(widest, len(ranked)) + 1):
        others = ranked[size:]
        mean = math.fsum(others) / max(1, len(others))
        found.append(math.fsum(others) + math.fsum(value * math.log(value / mean) for value in others))
    return found


def lowest_loss(rows: list[list[float]], n_entries: int, widest: int) -> float:
    """The lowest sum that ``n_entries`` can reach, by dynamic programming over the rows."""
    lowest = [0.0] + [math.inf] * n_entries
    for row in rows:
        costs = loss_by_size(row, widest)
        lowest = [
            min(lowest[total - size] + costs[size] for size in range(min(total, len(costs) - 1) + 1))
            for total in range(n_entries + 1)
        ]
    return min(lowest)


def random_layers(seed: int, n_keys: int = 40) -> dict[int, Tensor]:
    """Two layers of (3, 4, n_keys) causal rows, from nearly even to nearly all on one key."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 2.0, 6.0])[:, None, None]
    future = torch.arange(n_keys) > torch.tensor([3, 17, 30, n_keys - 1])[:, None]
    layers = {}
    for layer in (1, 5):
        logits = scale * torch.randn(3, 4, n_keys, generator=generator, dtype=torch.float64)
        layers[layer] = logits.masked_fill(future, float("-inf")).softmax(-1)
    return layers


@settings(deadline=None)
@given(st.integers(1, 9), st.sampled_from([1.0, 0.995, 0.9]), st.integers(0, 10**6))
def test_a_budget_goes_to_the_entries_that_lose_least(per_row: int, mass: float, seed: int) -> None:
    layers = random_layers(seed)
    found = sparse_rows(layers, per_row, mass)
    n_entries, lost, rows = 0, 0.0, []
    for layer, exact in layers.items():
        stored = kept(found[layer])
        torch.testing.assert_close(stored, torch.where(stored > 0, exact, 0))
        torch.testing.assert_close(stored.sum(-1) + found[layer].remaining, torch.ones_like(stored[..., 0]))
        for row, entries_of_row in zip(exact.reshape(-1, 40).tolist(), stored.reshape(-1, 40).tolist(), strict=True):
            size = sum(value > 0 for value in entries_of_row)
            assert sorted(row, reverse=True)[:size] == sorted(entries_of_row, reverse=True)[:size]
            assert size <= BROADEST * per_row
            n_entries, lost = n_entries + size, lost + loss_by_size(row, 40)[size]
            rows.append(row)
    needed = sum(fewest(row, mass, BROADEST * per_row) for row in rows)
    if needed <= per_row * 24:
        assert n_entries == needed
    else:
        assert n_entries == per_row * 24
        # The optimum may divide an entry's gain otherwise where two of a row's are worth more together.
        assert lost <= 1.02 * lowest_loss(rows, n_entries, BROADEST * per_row) + 1e-9


def fewest(row: list[float], mass: float, widest: int) -> int:
    """How many of the largest entries hold ``mass``, at most ``widest``."""
    ranked = sorted((value for value in row if value > 0), reverse=True)
    held = 0.0
    for size, value in enumerate(ranked):
        if size == widest or held >= mass:
            return size
        held += value
    return len(ranked)


def test_a_sure_row_that_leaves_little_mass_gives_entries_to_a_broad_one() -> None:
    """What lies beyond 99.5 % of a sure row is worth more than a broad row's 41st entry."""
    sure = torch.full((400,), 1e-9, dtype=torch.float64)
    sure[7], sure[11] = 0.996, 0.004 - 398e-9
    broad = torch.linspace(0.0035, 0.0015, 400, dtype=torch.float64)
    rows = torch.stack([sure, broad / broad.sum()])[None, None]
    found = sparse_rows({0: rows}, 21, 0.995)[0]
    assert (found.probabilities > 0).sum(-1).tolist() == [[[2, 40]]]
    assert float(found.remaining[0, 0, 0]) < 1e-6
    # Within the budget no more is kept than the mass asks for.
    assert (sparse_rows({0: rows}, 300, 0.995)[0].probabilities[0, 0, 0] > 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_mass_and_tiny_numbers_are_no_obstacle(dtype: torch.dtype) -> None:
    rows = random_layers(seed=4)[1].to(dtype)
    rows[0, 0] = 0
    rows[1, 1, 0], rows[1, 1, 5] = torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 8
    found = sparse_rows({0: rows}, 4, 0.995)[0]
    assert int((found.probabilities > 0).sum()) == 4 * 12
    assert not found.probabilities[0, 0].any() and float(found.remaining[0, 0]) == 0.0
    assert found.probabilities.isfinite().all() and found.remaining.isfinite().all()
