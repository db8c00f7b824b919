"""Steps that take turns, so that a drift of the machine's speed hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from seekr_peft.peak_memory import PeakMemory

Steps = Mapping[str, Callable[[], object]]


def median_seconds(steps: Steps, repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median wall time of each step over ``repeats`` rounds, after one round that does not count.

    Each round begins with another step: the first of a round takes about 2 % longer than the same step as the last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_number in range(repeats + 1):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            _synchronise(device)
            started = time.perf_counter()
            steps[name]()
            _synchronise(device)
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(steps: Steps, device: str = "cpu") -> dict[str, int]:
    """Peak bytes of each step, after a first call that may fill caches."""
    peaks = {}
    for name, step in steps.items():
        step()
        with PeakMemory(device) as memory:
            step()
        peaks[name] = memory.peak
    return peaks


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
