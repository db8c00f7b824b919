"""Tiny PeftModels, tokenised datasets and a hand-written training loop for the tests of the method itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seekr_peft.memory import ReplaySample, draw_queries
from seekr_peft.model.adapter_stack import AdapterStack
from support.tiny_models import VOCABULARY, tiny_llama


def fresh_peft(attention: str = "sdpa", seed: int = 3, **lora: Any) -> Any:
    """A PeftModel with PEFT's own fresh adapter (B = 0), as a user makes it; the same weights for the same seed."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(tiny_llama(attention), LoraConfig(**options))


def randomise(parameters: dict[str, Tensor], seed: int, scale: float = 0.1) -> None:
    """Stand-in for training: every factor (B above all) becomes non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * scale


def trained_stack(n_tasks: int = 1, open_task: bool = True, **options: Any) -> AdapterStack:
    """A stack with ``n_tasks`` finished tasks and, with ``open_task``, one more whose adapter is already non-zero."""
    lora = options.pop("lora", {})
    stack = AdapterStack(fresh_peft(**lora), **options)
    for task in range(n_tasks + open_task):
        stack.begin()
        randomise(stack.parameters(), seed=task)
        if task < n_tasks:
            stack.finish()
    return stack


def make_dataset(n: int, seed: int = 0, answer: int = 3) -> list[dict[str, list[int]]]:
    """``n`` tokenised samples of 7 to 13 tokens; the last ``answer`` ones are the answer: the first ones reversed."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        length = int(torch.randint(4, 11, (), generator=generator))
        prompt = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        target = prompt[:answer][::-1]
        samples.append({"input_ids": prompt + target, "labels": [-100] * length + target})
    return samples


def make_samples(n: int, seed: int = 0, budget: int | None = 5) -> list[ReplaySample]:
    """The same as replay samples of different length, each with its own query positions."""
    samples = []
    for i, item in enumerate(make_dataset(n, seed)):
        ids, labels = torch.tensor(item["input_ids"]), torch.tensor(item["labels"])
        samples.append(ReplaySample(ids, labels, draw_queries(len(ids), budget, seed + i)))
    return samples


def logits_of(model: Any, length: int = 12) -> Tensor:
    """Logits of one fixed sequence, with dropout off."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, length + 1)[None]).logits
    model.train(mode)
    return logits


def train_by_hand(method: Any, dataset: list[dict[str, list[int]]], steps: int, lr: float = 1e-2) -> list[bool]:
    """The loop a user writes: one sample a step, plus the replay loss where one is due. Returns where it was due."""
    optimizer = torch.optim.AdamW([p for p in method.model.parameters() if p.requires_grad], lr=lr)
    method.stack.check_optimizer(optimizer)
    due = []
    for step in range(steps):
        item = dataset[step % len(dataset)]
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        loss = method.model(input_ids=ids, labels=labels).loss
        replay = method.replay_loss()
        due.append(replay is not None)
        (loss if replay is None else loss + replay).backward()
        optimizer.step()
        optimizer.zero_grad()
    return due
