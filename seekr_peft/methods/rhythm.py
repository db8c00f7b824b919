"""When replay happens: a pure function of the step number. Imports nothing from the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

UNKNOWN_LENGTH_EVERY = 4
"""Steps between replay batches in a loop of unknown length without ``replay_every``; chosen, not measured."""


@dataclass(frozen=True)
class Rhythm:
    """A replay batch joins the last of every ``every`` optimiser steps; ``every`` of 0 means never."""

    every: int

    def due(self, step: int) -> bool:
        """Whether optimiser step ``step`` (from 0) has a replay batch."""
        return self.every > 0 and step % self.every == self.every - 1

    def count(self, total_steps: int) -> int:
        """Replay batches in ``total_steps`` steps."""
        return total_steps // self.every if self.every else 0


def plan_rhythm(
    n_replay: int,
    batch_size: int,
    total_steps: int | None,
    epochs: float,
    min_passes: int,
    replay_every: int | None,
) -> Rhythm:
    """Steps from one replay batch to the next.

    From the ratio, each replay sample is seen as often as a new one: once an epoch. At 1 % that is far too rare with
    adapters (it retained nothing in the measurements), so each sample is seen at least ``min_passes`` times, up to
    one replay batch a step. Whenever there are replay samples, at least one batch falls into the task.

    Args:
        n_replay: Replay samples of all earlier tasks together.
        total_steps: Optimiser steps of this task, or None when nobody knows.
        replay_every: The user's own rhythm, shortened only if the task would end without any replay.
    """
    if n_replay == 0:
        return Rhythm(0)
    if total_steps is None:
        return Rhythm(replay_every or UNKNOWN_LENGTH_EVERY)
    if replay_every is None:
        batches = math.ceil(max(epochs, min_passes) * n_replay / min(batch_size, n_replay))
        replay_every = total_steps // max(1, batches)
    return Rhythm(max(1, min(replay_every, total_steps)))
