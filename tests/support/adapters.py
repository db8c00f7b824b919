"""Steps of training and the sums of adapters that tests of the stack compare."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from seekr_peft.model.adapter_stack import AdapterStack
from support.core_models import fresh_peft, make_dataset

MODES = ["stack", "continue"]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def train_step(stack: AdapterStack, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=1e-2)
    for item in make_dataset(3):
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        stack.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


SUMMABLE = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 7, "down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "target_modules": ["q_proj", "v_proj"]},
    {"lora_dropout": 0.3},
]


def two_adapters() -> Any:
    model = fresh_peft()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=20, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.base_model.set_adapter(["default", "second"])
    return model


def adapter_change(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Sum over adapters of scaling * B A, dense, float64, by module."""
    changes = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            present = [name for name in names if name in module.lora_A]
            parts = [
                module.scaling[name] * module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
                for name in present
            ]
            changes[path] = torch.stack(parts).sum(dim=0).detach()
    return changes
