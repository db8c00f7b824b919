"""The endless, seeded order in which samples are drawn for replay, and for what else needs a second batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def endless_batches(
    n_samples: int, batch_size: int, seed: int, *, leaves_rest_out: bool = False
) -> Iterator[list[int]]:
    """Batches of indices without end, reshuffled each pass; nothing where there are no samples.

    Args:
        batch_size: Indices in a batch; ``n_samples`` where there are fewer.
        leaves_rest_out: What becomes of the last samples of a pass where they fill no batch: left out, or drawn
            together with the first ones of the next pass.
    """
    if not n_samples:
        return
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, n_samples)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            order = torch.randperm(n_samples, generator=generator).tolist()
            queue = order if leaves_rest_out else queue + order
        yield queue[:size]
        queue = queue[size:]
