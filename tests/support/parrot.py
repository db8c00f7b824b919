"""A model that has learnt a task's training samples by heart, without any training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from seekr_peft import Task


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Parrot(torch.nn.Module):
    """Writes after each known prompt (by its ids) the given ids, and then only junk."""

    def __init__(self, replies: dict[tuple[int, ...], list[int]], junk: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.replies, self.junk = replies, junk
        self.generation_config: Any = None
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            reply = self.replies[tuple(index for index, real in zip(ids, mask, strict=True) if real)]
            rows.append(
                ids + (reply + [self.junk] * generation_config.max_new_tokens)[: generation_config.max_new_tokens]
            )
        return torch.tensor(rows)


def parrot(tokenizer: Any, task: Task, max_length: int = 512) -> Parrot:
    """What a model does that has learnt the training samples of ``task`` by heart."""
    replies = {}
    for row in task.tokenized(tokenizer, max_length).train:
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        replies[tuple(row["input_ids"][:start])] = row["input_ids"][start:]
    return Parrot(replies, plain(tokenizer, "red")[0])
