"""Steps that take turns, so that a drift of the machine's speed hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from seekr_peft.model.peak_memory import PeakMemory

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
            synchronise(device)
            started = time.perf_counter()
            steps[name]()
            synchronise(device)
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


@dataclass(frozen=True)
class DeviceWork:
    """What one call makes a GPU do: seconds that it computes, and kernels and copies that the host starts for that."""

    seconds: float
    launches: int


def device_work(steps: Steps, device: str) -> dict[str, DeviceWork]:
    """Of each step, the third call; nothing on a CPU. Where the host's time to start a step's kernels is longer than
    the kernels themselves (small models, large GPUs), wall times compare hosts; this compares GPUs."""
    if device != "cuda":
        return {}
    found = {}
    for name, step in steps.items():
        step()
        step()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            step()
            torch.cuda.synchronize()
        events = [event for event in record.key_averages() if event.device_type == DeviceType.CUDA]
        microseconds = sum(event.self_device_time_total for event in events)
        found[name] = DeviceWork(microseconds / 1e6, sum(event.count for event in events))
    return found


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
