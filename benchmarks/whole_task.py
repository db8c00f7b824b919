"""A whole second task, all phases (adapter, training, scoring, storing), for each method at the same rhythm."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainingArguments

from benchmarks.replay_step import build_model
from seekr_peft import ContinualTrainer, SeekrConfig
from seekr_peft.methods import get_method
from seekr_peft.tasks.tokenize import IGNORED_LABEL

BATCH, SAMPLES = 4, 100


def make_data(length: int, seed: int, n: int = SAMPLES) -> list[dict[str, list[int]]]:
    """Random samples whose last 16 tokens are the answer."""
    rows = torch.randint(3, 4096, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": [IGNORED_LABEL] * (length - 16) + row[-16:]} for row in rows]


def seconds_of_second_task(method_name: str, length: int, every: int, device: str) -> float:
    """Wall time of the ``with method.task(...)`` block of the second of two tasks; the first gets one step."""
    torch.manual_seed(0)
    config = SeekrConfig(replay_every=every, teacher_loss_limit=1e9, teacher_entropy_limit=1e9)
    with TemporaryDirectory() as folder:
        model = build_model(length, "sdpa", device)
        method = get_method(method_name)(model, config, directory=folder)
        train_task(method, "first", make_data(length, 1), folder, 1, device)
        second = make_data(length, 2)
        started = time.perf_counter()
        train_task(method, "second", second, folder, SAMPLES // BATCH, device)
        return time.perf_counter() - started


def train_task(method: Any, name: str, data: list[dict[str, list[int]]], folder: str, steps: int, device: str) -> None:
    """One task of ``steps`` optimiser steps through ``method``."""
    with method.task(name, replay_from=data):
        arguments = TrainingArguments(
            output_dir=str(Path(folder) / "trainer"),
            use_cpu=device == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            max_steps=steps,
            per_device_train_batch_size=BATCH,
        )
        ContinualTrainer(model=method.model, method=method, args=arguments, train_dataset=data).train()


def measure(length: int, every: int, device: str, repeats: int = 2) -> dict[str, float]:
    """Least seconds by method and the ratios of SEEKR to replay and to plain fine-tuning."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name in ("sequential", "replay", "seekr"):
            seconds = seconds_of_second_task(name, length, every, device)
            best[name] = min(seconds, best.get(name, seconds))
    return {
        **best,
        "to_replay": best["seekr"] / best["replay"],
        "to_sequential": best["seekr"] / best["sequential"],
    }
