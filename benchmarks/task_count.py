"""How time, disk and memory grow with the number of tasks, on a model of the demo's size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import median_seconds, peak_bytes
from benchmarks.whole_task import make_data, train_task
from seekr_peft import Seekr, SeekrConfig

STEPS, STEP_ROUNDS, TASK_ROUNDS = 10, 30, 3


class TaskSequence:
    """A model that is taught one task after another, in ``folder``."""

    def __init__(self, folder: str, rank_limit: int | None, device: str) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=128, **sizes)).to(device)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        config = SeekrConfig(replay_every=5, teacher_loss_limit=1e9, teacher_entropy_limit=1e9)
        self.ids = torch.tensor([row["input_ids"] for row in make_data(64, 0, n=4)], device=device)
        self.device = device
        self.folder = folder
        self.method = Seekr(model, config, directory=folder, rank_limit=rank_limit)

    def teach(self, n_tasks: int = 1) -> float:
        """Train ``n_tasks`` more; seconds of the last one."""
        seconds = 0.0
        for _ in range(n_tasks):
            task = len(self.method.task_names)
            data = make_data(64, task, n=100)
            started = time.perf_counter()
            train_task(self.method, f"task{task}", data, self.folder, STEPS, self.device)
            seconds = time.perf_counter() - started
        return seconds

    def step(self) -> None:
        """Forward and backward of one batch."""
        self.method.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.method.model.zero_grad()

    def ram(self) -> int:
        """Bytes of all weights, and what a step needs on top at its peak."""
        weights = sum(tensor.nbytes for tensor in (*self.method.model.parameters(), *self.method.model.buffers()))
        return weights + peak_bytes({"step": self.step}, self.device)["step"]

    def disk(self) -> int:
        """Bytes of all the sequence's files."""
        return sum(path.stat().st_size for path in Path(self.folder).rglob("*") if path.is_file())


def measure(
    counts: Sequence[int],
    rank_limit: int | None,
    device: str = "cpu",
    step_rounds: int = STEP_ROUNDS,
    task_rounds: int = TASK_ROUNDS,
) -> dict[int, dict[str, Any]]:
    """For sequences of each number of tasks: median seconds of a step of the task after them, least seconds of one of
    the next ``task_rounds`` tasks, bytes on disk a task, and in RAM (or a GPU's memory). The sequences take turns:
    measured one after the other, the ratio of two steps had come out at 0.84 and at 1.39."""
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        sequences = {n: TaskSequence(stack.enter_context(TemporaryDirectory()), rank_limit, device) for n in counts}
        for n, sequence in sequences.items():
            sequence.teach(n)
            found[n] = {"disk_per_task": sequence.disk() / n}
            sequence.method.stack.begin()
            found[n]["ram"] = sequence.ram()
        steps = median_seconds({str(n): sequence.step for n, sequence in sequences.items()}, step_rounds, device)
        for sequence in sequences.values():
            sequence.method.stack.abandon()
        rounds = [{n: sequence.teach() for n, sequence in sequences.items()} for _ in range(task_rounds)]
        for n in counts:
            found[n] |= {"step_seconds": steps[str(n)], "task_seconds": min(seconds[n] for seconds in rounds)}
    return found
