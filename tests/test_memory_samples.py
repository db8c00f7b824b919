"""Which samples and queries are kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.core_models import make_dataset

from seekr_peft.errors import DataError
from seekr_peft.memory import (
    choose_queries,
    choose_samples,
    draw_queries,
    replay_count,
)
from seekr_peft.memory.samples import select_first, select_random


@pytest.mark.parametrize(
    ("n_train", "ratio", "kept"),
    [(600, 0.01, 6), (5000, 0.01, 50), (30, 0.01, 1), (1, 0.5, 1), (7, 1.0, 7), (10, 0.25, 2)],
)
def test_the_replay_ratio_is_rounded_and_keeps_at_least_one_sample(n_train: int, ratio: float, kept: int) -> None:
    assert replay_count(n_train, ratio) == kept


@given(st.integers(1, 10**5), st.floats(1e-6, 1.0))
def test_never_more_samples_are_kept_than_there_are(n_train: int, ratio: float) -> None:
    assert 1 <= replay_count(n_train, ratio) <= n_train


def test_the_random_choice_is_sorted_without_repeats_and_seeded() -> None:
    dataset = range(600)
    drawn = select_random(dataset, 40, seed=5)
    assert drawn == sorted(set(drawn)) and len(drawn) == 40 and drawn[0] >= 0 and drawn[-1] < 600
    assert drawn == select_random(dataset, 40, seed=5)
    assert len({tuple(select_random(dataset, 40, seed)) for seed in range(30)}) == 30


def test_the_random_choice_is_not_the_first_samples() -> None:
    assert select_first(range(600), 6, seed=5) == [0, 1, 2, 3, 4, 5]
    counts = Counter(index < 300 for seed in range(50) for index in select_random(range(600), 6, seed))
    assert 100 < counts[True] < 200


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 400)), st.integers(0, 10**6))
def test_queries_are_sorted_positions_of_the_sample_and_within_the_budget(
    length: int, budget: int | None, seed: int
) -> None:
    queries = draw_queries(length, budget, seed)
    assert len(queries) == (length if budget is None else min(length, budget))
    assert torch.equal(queries, queries.unique()) and queries[0] >= 0 and queries[-1] < length
    assert torch.equal(queries, draw_queries(length, budget, seed))


def test_chosen_samples_are_those_of_the_dataset_and_each_has_its_own_queries() -> None:
    dataset = [{"input_ids": [i] * 40, "labels": [-100] * 39 + [i]} for i in range(100)]
    samples = choose_samples(dataset, 0.1, query_budget=7, seed=3)
    assert [int(sample.input_ids[0]) for sample in samples] == select_random(dataset, 10, 3)
    assert all(len(sample.queries) == 7 and sample.labels[-1] == sample.input_ids[0] for sample in samples)
    assert len({tuple(sample.queries.tolist()) for sample in samples}) == 10
    again = choose_samples(dataset, 0.1, query_budget=7, seed=3)
    assert all(torch.equal(a.queries, b.queries) for a, b in zip(samples, again, strict=True))


@given(st.data())
def test_the_rows_that_the_answer_comes_from_are_drawn_before_any_other(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 60))
    budget, seed = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 10**6))
    answered = data.draw(st.sets(st.integers(1, length - 1), min_size=1))
    labels = torch.tensor([5 if position in answered else -100 for position in range(length)])
    queries = choose_queries(labels, budget, seed, "answer")
    assert torch.equal(queries, queries.unique()) and len(queries) == min(budget, length)
    predicting = {position - 1 for position in answered}
    assert len(predicting & set(queries.tolist())) == min(budget, len(predicting))
    assert torch.equal(choose_queries(labels, budget, seed, "random"), draw_queries(length, budget, seed))


def test_which_rows_are_drawn_is_a_setting_of_the_samples() -> None:
    dataset = [{"input_ids": [1] * 40, "labels": [-100] * 37 + [1, 1, 1]} for _ in range(10)]
    chosen = choose_samples(dataset, 1.0, query_budget=5, seed=3, query_choice="answer")
    assert all({36, 37, 38} <= set(sample.queries.tolist()) and len(sample.queries) == 5 for sample in chosen)
    assert len({tuple(sample.queries.tolist()) for sample in chosen}) > 5


def test_padding_is_dropped_from_a_padded_dataset() -> None:
    item = {
        "input_ids": [0, 0, 5, 6, 7, 0],
        "labels": [-100, -100, -100, 6, 7, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    }
    (sample,) = choose_samples([item], 1.0, None, seed=0)
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.labels.tolist() == [-100, 6, 7]
    assert sample.queries.tolist() == [0, 1, 2]


def test_any_function_may_choose_the_samples() -> None:
    dataset = make_dataset(20)
    samples = choose_samples(dataset, 0.1, None, seed=0, selector=lambda data, count, seed: [len(data) - 1, 3][:count])
    assert [sample.input_ids.tolist() for sample in samples] == [dataset[19]["input_ids"], dataset[3]["input_ids"]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "replay_from is empty"),
        (iter([]), "replay_from is a list_iterator, of which no samples can be drawn"),
        ([3, 4], "sample 0 of replay_from is a int; it must be a mapping"),
        ([{"prompt": "a", "answer": "b"}], r"has no 'input_ids' \(it has answer, prompt\)"),
        ([{"input_ids": [1, 2]}], "has no 'labels'"),
        (
            [{"input_ids": [1, 2], "labels": [-100, 2, 3]}],
            "sample 0 of replay_from has 2 input_ids and 3 labels; give one",
        ),
        (
            [{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1]}],
            "sample 0 of replay_from has 2 input_ids and 1 attention_mask; give one for each token",
        ),
        ([{"input_ids": [1, 2, 3], "labels": [-100] * 3}], "sample 0 of replay_from has no answer token"),
        ([{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}], "has no answer token"),
    ],
)
def test_a_dataset_that_cannot_be_replayed_is_refused(dataset: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_samples(dataset, 0.5, None, seed=0)
