"""Models of every family under the tap, the batches that they read, and the selections that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap
from seekr_peft.heads import HeadSelection
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_qwen3,
    with_lora,
)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
}


EVERY_HEAD = HeadSelection.all(N_LAYERS, N_HEADS)


SOME_HEADS = HeadSelection({0: [1, 4], 2: [0, 3, 5]})


# Of each of the five samples of ``padded_batch``; -19 is position 0.
QUERIES = torch.tensor([[0, 18, -2, 5], [7, -1, -19, 12], [3, 0, 16, -4], [9, 9, 1, 17], [10, 2, -8, 6]])


families = pytest.mark.parametrize("family", BUILDERS)


paddings = pytest.mark.parametrize("padding", ["none", "left", "right", "mixed"])


def tapped_rows(model: nn.Module, batch: dict[str, Tensor], *args: Any, **options: Any) -> dict[int, Tensor]:
    with torch.no_grad(), AttentionTap(model, *args, **options) as tap:
        model(**batch)
    return tap.rows


def snapshot(model: nn.Module) -> list[Any]:
    """Hooks and attention names of every module."""
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
    )
    state: list[Any] = [dict(ALL_ATTENTION_FUNCTIONS)]
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        state.append((name, [list(getattr(module, table)) for table in tables], "forward" in vars(module)))
        state.append(getattr(config, "_attn_implementation", None))
    return state


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    model = with_lora(model).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model
