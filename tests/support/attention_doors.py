"""Flash and flex attention as they are on a machine without a GPU, and the rows that eager attention reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from seekr_peft.attention import AttentionTap
from seekr_peft.heads import HeadSelection
from support.tiny_models import (
    N_HEADS,
    N_LAYERS,
)

EVERY_HEAD = HeadSelection.all(N_LAYERS, N_HEADS)


def tapped_rows(model: nn.Module, batch: dict[str, Tensor], queries: Tensor | None = None) -> dict[int, Tensor]:
    with torch.no_grad(), AttentionTap(model, EVERY_HEAD, queries=queries) as tap:
        model(**batch)
    return tap.rows


def eager_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float | None
) -> tuple[Tensor, None]:
    """What every kernel computes, in plain steps; (batch, T, heads, d) like transformers' own functions."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax(logits.masked_fill(~allowed, -1e9), dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def stub_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A stand-in with flash attention's contract: a 2D padding mask or None; causality and window inside the kernel,
    the window reaching as far to the right as to the left where there is no causality."""
    assert attention_mask is None or attention_mask.dim() == 2
    positions = torch.arange(query.shape[2])
    distance = positions[:, None] - positions
    allowed = torch.ones(1, 1, *distance.shape, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        allowed = allowed & (distance >= 0)
    if sliding_window is not None:
        allowed = allowed & (distance.abs() <= sliding_window - 1)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None].bool()
    return eager_kernel(module, query, key, value, allowed, scaling)


def stub_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A stand-in with flex attention's contract: a BlockMask."""
    assert isinstance(attention_mask, BlockMask)
    return eager_kernel(module, query, key, value, dense_mask(attention_mask, *query.shape[:3]), scaling)


def dense_mask(block_mask: BlockMask, batch: int, heads: int, length: int) -> Tensor:
    """Ask the mask about every (sample, head, query, key), one by one along the queries."""
    axes = [torch.arange(size) for size in (batch, heads, length, length)]
    sample, head, query, key = torch.meshgrid(*axes, indexing="ij")
    return block_mask.mask_mod(sample, head, query, key).expand(batch, heads, length, length)


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the stand-ins with the masks of the kernels that they stand for, and forget them afterwards."""
    # transformers compiles its block masks, which takes a minute and changes nothing.
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda _compile=None, **arguments: create_block_mask(**arguments)
    )
    kept = [(table, dict(table._global_mapping)) for table in (AttentionInterface, AttentionMaskInterface)]
    AttentionInterface.register("stub_flash", stub_flash)
    AttentionMaskInterface.register("stub_flash", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    AttentionInterface.register("stub_flex", stub_flex)
    AttentionMaskInterface.register("stub_flex", ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"])
    yield
    for table, mapping in kept:
        table._global_mapping.clear()
        table._global_mapping.update(mapping)


def through(model: nn.Module, door: str) -> nn.Module:
    """``model`` with another attention function, and proof that it is used."""
    model.config._attn_implementation = door
    return model
