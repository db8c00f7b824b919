"""How time, disk and memory grow with the number of tasks, on the demo's model."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.whole_task import make_data, train_task
from seekr_peft import Seekr, SeekrConfig

STEPS = 10


def measure(n_tasks: int, rank_limit: int | None) -> dict[str, Any]:
    """Seconds of the first, middle and last task, the same for one training step, bytes on disk and of adapters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=128, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    limits = {"teacher_loss_limit": 1e9, "teacher_entropy_limit": 1e9}
    seconds, steps, disk, parameters = [], [], [], []
    with TemporaryDirectory() as folder:
        method = Seekr(model, SeekrConfig(replay_every=5, **limits), directory=folder, rank_limit=rank_limit)
        for task in range(n_tasks):
            data = make_data(64, task, n=100)
            started = time.perf_counter()
            train_task(method, f"task{task}", data, folder, STEPS, "cpu")
            seconds.append(time.perf_counter() - started)
            steps.append(_step_seconds(method, data))
            disk.append(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()))
            parameters.append(sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name))
    return {
        "tasks": n_tasks,
        "rank_limit": rank_limit,
        "seconds_first": seconds[0],
        "seconds_last": sorted(seconds[-3:])[1],
        "step_first": steps[0],
        "step_last": sorted(steps[-3:])[1],
        "disk_per_task": disk[-1] / n_tasks,
        "adapter_bytes": parameters[-1],
    }


def _step_seconds(method: Any, data: list[dict[str, list[int]]]) -> float:
    """Forward and backward of one batch with a new adapter open, least of five."""
    ids = torch.tensor([row["input_ids"] for row in data[:4]])
    best = float("inf")
    method.stack.begin()
    for _ in range(5):
        started = time.perf_counter()
        method.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        best = min(best, time.perf_counter() - started)
        method.model.zero_grad()
    method.stack.abandon()
    return best
