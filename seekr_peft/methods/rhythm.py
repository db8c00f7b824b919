"""When replay happens: a pure function of the step number."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

logger = logging.getLogger("seekr_peft")

UNKNOWN_LENGTH_EVERY = 4
"""Steps between replay batches in a loop of unknown length without ``replay_every``; chosen, not measured."""


@dataclass(frozen=True)
class Rhythm:
    """``batches`` replay batches in ``steps`` optimiser steps, at most one a step, as evenly as whole steps allow; and
    so on in the steps after them.

    The gaps between two of them differ by one step at most, and the last falls on the last step.
    """

    batches: int
    steps: int = 1

    @classmethod
    def never(cls) -> Rhythm:
        """No replay."""
        return cls(0)

    @classmethod
    def every(cls, steps: int) -> Rhythm:
        """A replay batch in the last of every ``steps`` steps."""
        return cls(1, steps)

    def due(self, step: int) -> bool:
        """Whether optimiser step ``step`` (from 0) has a replay batch."""
        return self.count(step + 1) > self.count(step)

    def count(self, total_steps: int) -> int:
        """Replay batches in ``total_steps`` steps."""
        return total_steps * self.batches // self.steps


def plan_rhythm(
    n_replay: int,
    batch_size: int,
    total_steps: int | None,
    epochs: float,
    min_passes: int,
    replay_every: int | None,
) -> Rhythm:
    """How many replay batches a task has, spread evenly over its steps.

    From the ratio, each replay sample is seen as often as a new one: once an epoch. At 1 % that is far too rare with
    adapters (it retained nothing in the measurements), so each sample is seen at least ``min_passes`` times, up to
    one replay batch a step; where that is fewer passes, a warning says so. Whenever there are replay samples, at least
    one batch falls into the task.

    Args:
        n_replay: Replay samples of all earlier tasks together.
        total_steps: Optimiser steps of this task, or None when nobody knows.
        replay_every: The user's own rhythm, shortened only if the task would end without any replay.
    """
    if n_replay == 0:
        return Rhythm.never()
    if total_steps is None:
        return Rhythm.every(replay_every or UNKNOWN_LENGTH_EVERY)
    if replay_every is not None:
        return Rhythm.every(max(1, min(replay_every, total_steps)))
    size = min(batch_size, n_replay)
    wanted = math.ceil(max(epochs, min_passes) * n_replay / size)
    if total_steps * size < min_passes * n_replay:
        _say_how_few_passes(n_replay, size, total_steps, min_passes)
    return Rhythm(min(wanted, total_steps), total_steps)


def _say_how_few_passes(n_replay: int, size: int, total_steps: int, min_passes: int) -> None:
    larger = math.ceil(min_passes * n_replay / total_steps)
    remedy = f", or set replay_batch_size to {larger}" if larger <= n_replay else ""
    logger.warning(
        "replay: even a batch of %d in each of the %d steps shows each of the %d replay samples only %.1f times, where "
        "min_replay_passes asks for %d; train for more steps%s.",
        size,
        total_steps,
        n_replay,
        total_steps * size / n_replay,
        min_passes,
        remedy,
    )
