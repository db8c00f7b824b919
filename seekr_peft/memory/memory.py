"""``ReplayMemory``: the memories of all finished tasks and the endless, seeded order in which they are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from ..errors import MemoryFormatError
from ..files.manifest import MANIFEST_FILE, folder_damages
from .batch import ReplayBatch, collate_flat
from .codec import unpack
from .storage import HEADER_FILE, WEIGHTS_FILE, TaskMemory
from .stream import endless_batches


class ReplayMemory:
    """Replay samples and teacher signals of finished tasks, on disk and memory-mapped.

    ``tasks`` is in the order of training. ``stream`` walks all samples in a seeded order, reshuffled each pass, so
    every sample is replayed equally often.
    """

    def __init__(self, tasks: list[TaskMemory] | None = None) -> None:
        self.tasks: list[TaskMemory] = list(tasks or [])

    @classmethod
    def open(cls, directories: list[Path]) -> ReplayMemory:
        """Open the task directories of a run; MemoryFormatError when one cannot be read, or is not what was written."""
        memory = cls([TaskMemory(directory) for directory in directories])
        for task in memory.tasks:
            if not (task.directory / MANIFEST_FILE).exists():
                # Of an earlier version, which kept no checksums.
                task.check_values()
                continue
            for name in (WEIGHTS_FILE, HEADER_FILE):
                for damage in folder_damages(task.directory, only=name):
                    raise MemoryFormatError(f"{damage}; run that task again.")
        return memory

    def __len__(self) -> int:
        return sum(len(task) for task in self.tasks)

    @property
    def bytes(self) -> int:
        """Bytes on disk, over all tasks."""
        return sum(task.bytes for task in self.tasks)

    def add(self, task: TaskMemory) -> None:
        """Append a finished task's memory."""
        self.tasks.append(task)

    def batch(
        self, places: list[tuple[int, int]], pad_token_id: int = 0, device: torch.device | None = None
    ) -> ReplayBatch:
        """The batch of the samples at ``places``, pairs of task index and sample index, on ``device`` (by default the
        CPU). What lies on disk is moved as it is and decoded there."""
        device = device or torch.device("cpu")
        packed = [self.tasks[task].packed(index) for task, index in places]
        return collate_flat(
            [self.tasks[task].sample(index) for task, index in places],
            [self.tasks[task].selection for task, _ in places],
            [None if found.rows is None else unpack(found.rows.to(device)) for found in packed],
            [unpack(found.logits.to(device)) for found in packed if found.logits is not None],
            pad_token_id,
            device,
        )

    def stream(
        self,
        batch_size: int,
        seed: int,
        pad_token_id: int = 0,
        where: Callable[[], torch.device] | None = None,
        start: int = 0,
    ) -> Iterator[ReplayBatch]:
        """Batches without end; the last of a pass may be filled from the next pass. Nothing when empty. ``where`` says
        on which device a batch is to be (by default the CPU), and is asked when it is drawn. The first ``start``
        batches are passed over without being read."""
        for places in islice(self._order(batch_size, seed), start, None):
            yield self.batch(places, pad_token_id, where() if where else None)

    def _order(self, batch_size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
        places = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]
        for chosen in endless_batches(len(places), batch_size, seed):
            yield [places[index] for index in chosen]
