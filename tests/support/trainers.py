"""A small model with an adapter, its samples of two tasks, and a trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seekr_peft import ContinualTrainer
from support.tiny_models import VOCABULARY, tiny_llama


def samples(n_samples: int, seed: int) -> list[dict[str, list[int]]]:
    """Tokenised samples of 8-15 tokens whose answers have 1-6: a mean of micro-batch means is not their mean."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n_samples):
        length = int(torch.randint(8, 16, (), generator=generator))
        n_answer = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length - n_answer) + ids[-n_answer:]})
    return made


OLD, NEW = samples(12, seed=1), samples(22, seed=2)


def adapted(model: Any = None) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = tiny_llama(num_hidden_layers=2).double() if model is None else model
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def perturb(method: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in method.stack.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "seed": 6,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


def trained(method: Any, args: Any, dataset: Any = NEW, callbacks: Any = None) -> tuple[dict[str, Tensor], Any]:
    """Parameters of the new task's adapter after training, before the task is closed; and the trainer."""
    with method.task("new", replay_from=dataset):
        trainer = ContinualTrainer(
            model=method.model, method=method, args=args, train_dataset=dataset, callbacks=callbacks
        )
        trainer.train()
        return copied(method.stack.parameters()), trainer


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)
