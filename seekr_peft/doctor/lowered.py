"""Autocast for the meta device, which torch does not have there: a model's products in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention import attention_modules
from ..attention.models import EAGER, has_attention

LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _LoweredLinear(nn.Linear):
    """A linear layer under autocast, which torch does not have for the meta device."""

    lowered: torch.dtype
    casts: list[Tensor]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(self.lowered)
        if self.weight.requires_grad:
            # Autocast keeps a trained weight's cast until its block ends.
            self.casts.append(weight)
        return F.linear(input.to(self.lowered), weight, None if self.bias is None else self.bias.to(self.lowered))


class _LoweredProducts(TorchFunctionMode):
    """The products of an eager attention module under autocast, while its forward runs."""

    functions = frozenset(
        {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
    )

    def __init__(self, lowered: torch.dtype) -> None:
        super().__init__()
        self.lowered = lowered

    def begin(self, module: nn.Module, args: Any) -> None:
        self.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions:
            args = [
                value.to(self.lowered) if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in args
            ]
        return func(*args, **(kwargs or {}))


@contextmanager
def lowered_forward(model: nn.Module, lowered: torch.dtype | None) -> Iterator[None]:
    """The model's forward under autocast and its output in float32, as accelerate wraps it; the backward outside."""
    if lowered is None:
        yield
        return
    casts: list[Tensor] = []
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    # Only eager attention's products are not in a linear layer, nor in the stand-in.
    attention = attention_modules(model).values() if has_attention(model) else []

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        casts.clear()
        output.logits = output.logits.float()

    handles = [model.register_forward_hook(finish)]
    for module in linear:
        module.__class__ = _LoweredLinear
        module.lowered, module.casts = lowered, casts
    for module in attention:
        module.lowered = lowered
        if model.config.get_text_config()._attn_implementation == EAGER:
            products = _LoweredProducts(lowered)
            handles.append(module.register_forward_pre_hook(products.begin))
            handles.append(module.register_forward_hook(products.end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in linear:
            del module.lowered, module.casts
            module.__class__ = nn.Linear
        for module in attention:
            del module.lowered
