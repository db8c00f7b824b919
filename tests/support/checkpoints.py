"""Two tasks' samples and a trainer that keeps checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from seekr_peft import ContinualTrainer


def samples(seed: int, count: int = 18) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(6, 12, (count,), generator=generator).tolist():
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length - 2) + ids[-2:]})
    return made


FIRST, SECOND = samples(1), samples(2)


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "per_device_train_batch_size": 3,
            "num_train_epochs": 3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 5,
            **settings,
        }
    )


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def trainer(method: Any, args: TrainingArguments, dataset: Any, stop_after: int | None = None) -> Any:
    made = ContinualTrainer(method=method, args=args, train_dataset=dataset)
    made.logged = []
    log = made.log

    def noting(logs: dict[str, float], *rest: Any, **more: Any) -> None:
        log(logs, *rest, **more)
        if "loss" in logs:
            made.logged.append((made.state.global_step, dict(logs)))

    made.log = noting
    step = made.training_step

    def stopping(*given: Any, **more: Any) -> Any:
        if stop_after is not None and made.state.global_step == stop_after:
            raise Killed
        return step(*given, **more)

    made.training_step = stopping
    return made
