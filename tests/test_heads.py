"""``HeadSelection`` and the importance that ranks heads: a case worked by hand, then the laws."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from seekr_peft.errors import ConfigError
from seekr_peft.heads import HeadSelection, ImportanceRecord, normalise_per_layer

# Sums: 10, 12, 9. Its largest single entry stands in the layer with the smallest sum.
BY_HAND = torch.tensor(
    [
        [4.0, 3.0, 2.0, 1.0],
        [6.0, 5.0, 0.5, 0.5],
        [9.0, 0.0, 0.0, 0.0],
    ]
)


def test_layers_are_chosen_first_and_then_heads_over_all_of_them_together() -> None:
    # Layers 0 and 1 (sums 10 and 12); of their heads 6, 5, 4 are the largest: two of layer 1, one of layer 0.
    assert HeadSelection.top(BY_HAND, layer_budget=2, head_budget=3) == HeadSelection({0: [0], 1: [0, 1]})


def test_the_head_budget_is_not_split_between_the_layers() -> None:
    assert HeadSelection.top(BY_HAND, layer_budget=2, head_budget=2) == HeadSelection({1: [0, 1]})


def test_without_a_layer_budget_the_largest_head_anywhere_wins() -> None:
    assert HeadSelection.top(BY_HAND, None, 1) == HeadSelection({2: [0]})
    assert HeadSelection.top(BY_HAND, 1, 1) == HeadSelection({1: [0]})


def test_a_share_of_heads_is_a_share_of_all_the_models_heads() -> None:
    # A quarter of 12 heads is 3, although only the 4 of layer 1 may be taken.
    assert HeadSelection.top(BY_HAND, 1, 0.25) == HeadSelection({1: [0, 1, 2]})
    assert HeadSelection.top(BY_HAND, 2 / 3, None) == HeadSelection({0: range(4), 1: range(4)})
    assert HeadSelection.top(BY_HAND, 1, 99) == HeadSelection({1: range(4)})


def test_ties_go_to_the_lower_index() -> None:
    assert HeadSelection.top(torch.ones(3, 4), 2, 5) == HeadSelection({0: [0, 1, 2, 3], 1: [0]})
    assert HeadSelection.top(torch.zeros(20, 30), 1, 3) == HeadSelection({0: [0, 1, 2]})


@st.composite
def importances(draw: DrawFn) -> Tensor:
    """Whole numbers with many ties."""
    n_layers, n_heads = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    values = draw(st.lists(st.integers(0, 5), min_size=n_layers * n_heads, max_size=n_layers * n_heads))
    return torch.tensor(values, dtype=torch.float32).view(n_layers, n_heads)


budgets = st.one_of(st.none(), st.integers(1, 50), st.floats(0.01, 1.0))


def slow_top(importance: Tensor, n_kept_layers: int, n_kept_heads: int) -> dict[int, list[int]]:
    """Sort tuples, largest first and lower index first among equals."""
    table = importance.tolist()
    layers = sorted(range(len(table)), key=lambda layer: (-sum(table[layer]), layer))[:n_kept_layers]
    heads = [(-table[layer][head], layer, head) for layer in layers for head in range(len(table[0]))]
    chosen: dict[int, list[int]] = {}
    for _, layer, head in sorted(heads)[:n_kept_heads]:
        chosen.setdefault(layer, []).append(head)
    return chosen


@given(importances(), st.integers(1, 6), st.integers(1, 42))
def test_top_equals_sorting_by_hand(importance: Tensor, layer_budget: int, head_budget: int) -> None:
    expected = slow_top(importance, layer_budget, head_budget)
    assert HeadSelection.top(importance, layer_budget, head_budget) == HeadSelection(expected)


@given(importances(), budgets, st.integers(1, 20))
def test_a_larger_head_budget_only_adds(importance: Tensor, layer_budget: int | float | None, heads: int) -> None:
    smaller = HeadSelection.top(importance, layer_budget, heads).mask(*importance.shape)
    larger = HeadSelection.top(importance, layer_budget, heads + 1).mask(*importance.shape)
    assert (smaller <= larger).all()


@given(importances(), budgets, budgets, st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**30]))
def test_scaling_the_importance_changes_nothing(
    importance: Tensor, layers: int | float | None, heads: int | float | None, factor: float
) -> None:
    assert HeadSelection.top(importance * factor, layers, heads) == HeadSelection.top(importance, layers, heads)


@given(importances(), st.integers(1, 6), st.integers(1, 42))
def test_the_whole_head_budget_is_spent(importance: Tensor, layers: int, heads: int) -> None:
    n_layers, n_heads = importance.shape
    assert HeadSelection.top(importance, layers, heads).n_heads == min(heads, min(layers, n_layers) * n_heads)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_importance_that_is_not_finite_is_refused_at_its_place(value: float) -> None:
    importance = BY_HAND.clone()
    importance[1, 2] = value
    with pytest.raises(ConfigError, match=f"got {value} at layer 1, head 2"):
        HeadSelection.top(importance)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (3, 0)])
def test_an_importance_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"shape \(n_layers, n_heads\)"):
        HeadSelection.top(torch.zeros(shape))


def test_a_selection_is_a_sorted_mapping_without_empty_layers_or_repeats() -> None:
    selection = HeadSelection({5: [3, 1, 3], 2: [0], 4: []})
    assert dict(selection) == {2: (0,), 5: (1, 3)}
    assert list(selection) == [2, 5] and len(selection) == 2 and selection.n_heads == 3
    assert repr(selection) == "HeadSelection({2: [0], 5: [1, 3]})"
    assert selection == HeadSelection({2: [0], 5: [1, 3]}) and hash(selection) == hash(HeadSelection(dict(selection)))
    assert selection != HeadSelection({2: [0]})


@pytest.mark.parametrize("heads", [{-1: [0]}, {0: [-2]}, {0: [1.5]}, {True: [0]}, {"0": [1]}, {0: torch.tensor([0.5])}])
def test_an_index_that_is_no_whole_number_of_at_least_zero_is_refused(heads: Any) -> None:
    with pytest.raises(ConfigError, match="index must be a whole number"):
        HeadSelection(heads)


@given(importances(), budgets, budgets)
def test_a_selection_survives_json_and_its_mask(
    importance: Tensor, layers: int | float | None, heads: int | float | None
) -> None:
    selection = HeadSelection.top(importance, layers, heads)
    assert HeadSelection.from_json(json.loads(json.dumps(selection.to_json()))) == selection
    mask = selection.mask(*importance.shape)
    assert int(mask.sum()) == selection.n_heads
    assert all(mask[layer, head] for layer, chosen in selection.items() for head in chosen)


def test_all_takes_every_head() -> None:
    assert HeadSelection.all(3, 5).mask(3, 5).all()
    assert HeadSelection.all(3, 5).n_heads == 15


def test_sensitivity_is_divided_by_its_layers_sum_and_a_silent_layer_stays_zero() -> None:
    normalised = normalise_per_layer(torch.tensor([[1.0, 3.0], [0.0, 0.0], [50.0, 150.0]]))
    assert torch.equal(normalised, torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.25, 0.75]]))


def test_a_sensitivity_of_nan_is_not_hidden_by_the_normalisation() -> None:
    broken = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    record = ImportanceRecord().extended(torch.ones(2, 2), broken)
    with pytest.raises(ConfigError, match="importance must be finite, got nan"):
        record.select("importance", None, 1)


def two_tasks() -> ImportanceRecord:
    record = ImportanceRecord().extended(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    return record.extended(torch.tensor([[4.0, 1.0]]), torch.tensor([[3.0, 1.0]]))


def test_importance_over_two_tasks_is_the_product_of_the_sums_as_in_the_paper() -> None:
    # S = (0.25 + 0.75, 0.75 + 0.25), F = (1 + 4, 2 + 1).
    assert torch.equal(two_tasks().importance(), torch.tensor([[5.0, 3.0]], dtype=torch.float64))


def test_importance_of_the_released_code_is_the_sum_of_the_products_and_differs() -> None:
    # 0.25 * 1 + 0.75 * 4 and 0.75 * 2 + 0.25 * 1.
    expected = torch.tensor([[3.25, 1.75]], dtype=torch.float64)
    assert torch.equal(two_tasks().importance("sum_of_products"), expected)


def test_a_record_does_not_change_when_it_is_extended() -> None:
    first = ImportanceRecord().extended(torch.ones(2, 3), torch.ones(2, 3))
    first.extended(torch.ones(2, 3), torch.ones(2, 3))
    assert len(first.forgettability) == len(first.sensitivity) == 1


def test_each_factor_alone_can_rank_the_heads() -> None:
    record = ImportanceRecord().extended(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[7.0, 1.0, 4.0]]))
    assert record.select("sensitivity", None, 1) == HeadSelection({0: [0]})
    assert record.select("forgettability", None, 1) == HeadSelection({0: [1]})
    assert record.select("importance", None, 1) == HeadSelection({0: [2]})  # 7, 5, 8 (over 12)


def test_random_heads_are_seeded_and_keep_the_budgets_and_all_ignores_them() -> None:
    record = ImportanceRecord().extended(torch.ones(8, 9), torch.ones(8, 9))
    first = record.select("random", 3, 10, seed=1)
    assert first == record.select("random", 3, 10, seed=1) != record.select("random", 3, 10, seed=2)
    assert len(first) <= 3 and first.n_heads == 10
    assert record.select("all", 3, 10) == HeadSelection.all(8, 9)


@pytest.mark.parametrize("choice", ["importance", "random", "all"])
def test_layers_without_attention_are_never_selected_and_do_not_count_in_a_share(choice: Any) -> None:
    # A hybrid model: only layers 1 and 3 of 4 have heads, the other rows are 0.
    scores = torch.zeros(4, 3)
    scores[1], scores[3] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    record = ImportanceRecord().extended(scores, scores)
    selection = record.select(choice, 1.0, 1.0, layers=[1, 3])
    assert selection == HeadSelection({1: range(3), 3: range(3)})
    half = record.select(choice, 0.5, None, layers=[1, 3])
    assert set(half) <= {1, 3} and (choice == "all" or half.n_heads == 3)


def test_layers_may_be_taken_in_turn_from_thirds_of_the_depth() -> None:
    """Sums 9 8 | 1 2 | 5 3: the first round takes layers 0, 4, 3, the second 1, 5, 2."""
    importance = torch.tensor([[9.0, 0], [8, 0], [1, 0], [2, 0], [5, 0], [3, 0]])
    kept = [sorted(HeadSelection.top(importance, budget, None, "thirds")) for budget in range(1, 7)]
    assert kept == [[0], [0, 4], [0, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert sorted(HeadSelection.top(importance, 3, None)) == [0, 1, 4]
    # Heads compete over all the kept layers together, as before.
    assert HeadSelection.top(importance, 3, 2, "thirds") == HeadSelection({0: [0], 4: [0]})


@given(st.integers(1, 9), st.integers(1, 9))
def test_thirds_are_as_equal_as_their_sizes_allow(n_layers: int, budget: int) -> None:
    scores = torch.rand(n_layers, 3, generator=torch.Generator().manual_seed(n_layers))
    kept = set(HeadSelection.top(scores, budget, None, "thirds"))
    counts = [len(kept & set(third.tolist())) for third in torch.arange(n_layers).tensor_split(3)]
    sizes = [len(third) for third in torch.arange(n_layers).tensor_split(3)]
    assert sum(counts) == min(budget, n_layers)
    assert all(a >= b - 1 or a == size for a, size in zip(counts, sizes, strict=True) for b in counts)
