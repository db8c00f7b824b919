"""O-LoRA: each task's adapter is kept orthogonal to the earlier ones (arXiv 2310.14152)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..config import MethodConfig
from .base import ContinualMethod
from .settings import OLoraConfig


class OLora(ContinualMethod):
    """Adds ``olora_lambda`` * sum over the adapted modules of ||A_earlier A_new^T||^2 to every optimiser step.

    Keeps no samples. ``A_earlier`` holds the rows of all earlier tasks' A, each times its adapter's scaling
    (``lora_alpha / r``), since that is where the sum of the earlier adapters keeps it.
    """

    name: ClassVar[str] = "olora"
    adapter_modes: ClassVar[tuple[str, ...]] = ("stack",)
    config_class: ClassVar[type[MethodConfig]] = OLoraConfig

    config: OLoraConfig

    def penalty(self) -> Tensor | None:
        earlier = self.stack.earlier_parameters()
        if not earlier or self.config.olora_lambda == 0:
            return None
        terms = [
            (earlier[path].detach().float() @ new.float().T).square().sum()
            for path, new in self.stack.parameters().items()
            if path.endswith(".lora_A") and path in earlier
        ]
        return self.config.olora_lambda * torch.stack(terms).sum()
