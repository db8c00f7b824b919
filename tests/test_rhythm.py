"""When replay batches fall due: worked cases, then the laws."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seekr_peft.methods.rhythm import UNKNOWN_LENGTH_EVERY, Rhythm, plan_rhythm

lengths = st.integers(1, 3000)
passes = st.integers(1, 60)
samples = st.integers(1, 500)
batches = st.integers(1, 64)
epochs = st.floats(0.1, 20)


def due_steps(rhythm: Rhythm, total_steps: int) -> list[int]:
    return [step for step in range(total_steps) if rhythm.due(step)]


def test_a_batch_joins_the_last_of_every_three_steps() -> None:
    assert due_steps(Rhythm.every(3), 10) == [2, 5, 8]
    assert Rhythm.every(3).count(10) == 3


def test_never_is_never() -> None:
    assert due_steps(Rhythm.never(), 50) == []
    assert Rhythm.never().count(50) == 0


def test_seven_batches_in_ten_steps_are_spread_and_end_with_the_last_step() -> None:
    assert due_steps(Rhythm(7, 10), 10) == [1, 2, 4, 5, 7, 8, 9]


@pytest.mark.parametrize(
    ("n_replay", "batch", "steps", "n_epochs", "min_passes", "given_every", "expected"),
    [
        (0, 8, 450, 6, 30, None, Rhythm.never()),  # the first task
        (8, 8, 450, 6, 30, None, Rhythm(30, 450)),  # 30 passes of one batch each
        (12, 8, 450, 6, 30, None, Rhythm(45, 450)),  # 30 * 12 / 8
        (6, 8, 450, 6, 30, None, Rhythm(30, 450)),  # a batch holds no more samples than there are
        (9, 8, 100, 1, 30, None, Rhythm(34, 100)),  # 33.75 batches
        (8, 8, 450, 50, 30, None, Rhythm(50, 450)),  # more epochs than the least number of passes
        (240, 8, 1875, 3, 30, None, Rhythm(900, 1875)),
        (250, 8, 1875, 3, 30, None, Rhythm(938, 1875)),  # 937.5
        (8, 8, 450, 6, 30, 7, Rhythm.every(7)),  # the user's own rhythm
        (8, 8, 5, 6, 30, 99, Rhythm.every(5)),  # shortened: the task would end without any replay
        (8, 8, None, 1, 30, None, Rhythm.every(UNKNOWN_LENGTH_EVERY)),
        (8, 8, None, 1, 30, 6, Rhythm.every(6)),
        (0, 8, None, 1, 30, 6, Rhythm.never()),
    ],
)
def test_worked_cases(
    n_replay: int,
    batch: int,
    steps: int | None,
    n_epochs: float,
    min_passes: int,
    given_every: int | None,
    expected: Rhythm,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert plan_rhythm(n_replay, batch, steps, n_epochs, min_passes, given_every) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("n_replay", "batch", "steps", "text"),
    [
        (600, 8, 100, "a batch of 8 in each of the 100 steps .* 600 replay samples only 1.3 times, .* to 180"),
        (6, 8, 20, "a batch of 6 in each of the 20 steps .* 6 replay samples only 20.0 times, .* more steps.$"),
        (251, 8, 941, "only 30.0 times, .* set replay_batch_size to 9.$"),  # 29.99
    ],
)
def test_fewer_passes_than_asked_for_are_said(
    n_replay: int, batch: int, steps: int, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert plan_rhythm(n_replay, batch, steps, 3, 30, None).count(steps) == steps
    assert [re.search(text, record.getMessage()) is not None for record in caplog.records] == [True]


@given(samples, batches, lengths, epochs, passes)
def test_the_batches_that_are_wanted_are_spread_evenly(
    n_replay: int, batch: int, steps: int, n_epochs: float, min_passes: int
) -> None:
    due = due_steps(plan_rhythm(n_replay, batch, steps, n_epochs, min_passes, None), steps)
    assert len(due) == min(steps, math.ceil(max(min_passes, n_epochs) * n_replay / min(batch, n_replay)))
    gaps = {later - earlier for earlier, later in pairwise([-1, *due])}
    assert max(gaps) - min(gaps) <= 1
    assert due[-1] == steps - 1


@given(samples, batches, lengths, epochs, passes, st.one_of(st.none(), st.integers(1, 4000)))
def test_there_is_always_some_replay_and_at_most_one_batch_a_step(
    n_replay: int, batch: int, steps: int, n_epochs: float, min_passes: int, every: int | None
) -> None:
    rhythm = plan_rhythm(n_replay, batch, steps, n_epochs, min_passes, every)
    due = due_steps(rhythm, steps)
    assert 1 <= len(due) <= steps
    assert len(due) == rhythm.count(steps)


@given(samples, batches, lengths, epochs, passes)
def test_every_sample_is_seen_the_least_number_of_times_whenever_the_steps_allow_it(
    n_replay: int, batch: int, steps: int, n_epochs: float, min_passes: int
) -> None:
    size = min(batch, n_replay)
    needed = math.ceil(max(min_passes, n_epochs) * n_replay / size)
    assume(needed <= steps)
    drawn = plan_rhythm(n_replay, batch, steps, n_epochs, min_passes, None).count(steps) * size
    assert drawn / n_replay >= min_passes
    assert drawn / n_replay >= n_epochs * (1 - 1e-12)


@given(batches, lengths, epochs, passes, st.one_of(st.none(), st.integers(1, 50)))
def test_without_samples_there_is_no_replay(
    batch: int, steps: int, n_epochs: float, min_passes: int, every: int | None
) -> None:
    assert due_steps(plan_rhythm(0, batch, steps, n_epochs, min_passes, every), steps) == []
