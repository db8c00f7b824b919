"""When replay batches fall due: worked cases, then the laws."""

from __future__ import annotations

import math

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
    assert due_steps(Rhythm(3), 10) == [2, 5, 8]
    assert Rhythm(3).count(10) == 3


def test_every_of_zero_is_never() -> None:
    assert due_steps(Rhythm(0), 50) == []
    assert Rhythm(0).count(50) == 0


@pytest.mark.parametrize(
    ("n_replay", "batch", "steps", "n_epochs", "min_passes", "given_every", "every"),
    [
        (0, 8, 450, 6, 30, None, 0),  # the first task
        (8, 8, 450, 6, 30, None, 15),  # 30 passes of one batch each in 450 steps
        (12, 8, 450, 6, 30, None, 10),  # 30 * 12 / 8 = 45 batches
        (6, 8, 450, 6, 30, None, 15),  # a batch holds no more samples than there are
        (9, 8, 100, 1, 30, None, 2),  # 33.75 batches are 34, so every second step
        (8, 8, 450, 50, 30, None, 9),  # more epochs than the least number of passes
        (600, 8, 100, 3, 30, None, 1),  # more wanted than there are steps: one a step
        (8, 8, 450, 6, 30, 7, 7),  # the user's own rhythm
        (8, 8, 5, 6, 30, 99, 5),  # shortened: the task would end without any replay
        (8, 8, None, 1, 30, None, UNKNOWN_LENGTH_EVERY),
        (8, 8, None, 1, 30, 6, 6),
        (0, 8, None, 1, 30, 6, 0),
    ],
)
def test_worked_cases(
    n_replay: int, batch: int, steps: int | None, n_epochs: float, min_passes: int, given_every: int | None, every: int
) -> None:
    assert plan_rhythm(n_replay, batch, steps, n_epochs, min_passes, given_every) == Rhythm(every)


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
