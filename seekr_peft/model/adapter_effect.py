"""Whether adapters that became one still do the same: a model's outputs on a few tokens before and after.

How far equal adapters differ by rounding alone, over the norm of the outputs, each token's mean taken out (random
models of 3 and 24 layers on a CPU, ranks 8 to 24):

    arithmetic                       worst token   all tokens together
    float32, NF4 computing in it     4e-6          2e-6
    float16                          5e-3          3e-3
    bfloat16                         3e-2          2e-2
    bfloat16, with routed experts    2e-1          3e-2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import AdapterError, DivergenceError
from .answers import evaluation_mode
from .facts import ModelFacts

ROWS, LENGTH = 4, 32
"""Samples, and tokens of each (its last ones), that are looked at."""
MOST_OUTPUTS = 4096
"""Entries of each token's outputs, evenly spaced, that are compared: a vocabulary has up to 260,000."""
TIGHT = 1e-3
"""In float32 on a CPU: the share of the outputs' norm by which no token may differ (with routed experts: half of the
tokens, since a rounding can send one to another expert)."""
LOOSE = 0.1
"""In any arithmetic: the share by which all tokens together may differ."""


def probe_tokens(dataset: Any, vocabulary: int) -> list[Tensor]:
    """Up to ``ROWS`` rows of up to ``LENGTH`` token ids, int64: the end of the first samples of ``dataset``, or, where
    it has no tokens to show (None, a stream), random ones below ``vocabulary``, always the same."""
    rows = []
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = [_last_tokens(dataset[index]) for index in range(min(ROWS, len(dataset)))]
    rows = [row for row in rows if len(row)]
    generator = torch.Generator().manual_seed(0)
    return rows or list(torch.randint(vocabulary, (ROWS, LENGTH // 2), generator=generator))


@contextmanager
def unchanged_outputs(model: nn.Module, rows: list[Tensor], what: str) -> Iterator[None]:
    """Refuse a block after which ``model`` gives other outputs on ``rows`` than before it: by more than ``TIGHT`` where
    it computes in float32 on a CPU, by more than ``LOOSE`` elsewhere (half precision, TF32, int8).

    Raises:
        DivergenceError: The outputs were not finite before.
        AdapterError: With ``what`` is refused, by how much they differ, and the tolerance.
    """
    before, exact = _outputs(model, rows)
    if not before.isfinite().all():
        raise DivergenceError(
            f"{what} diverged: the model's outputs are not finite after its training, which would spoil the earlier "
            f"tasks as well; this task is dropped: train it again with a lower learning_rate."
        )
    yield
    after, _ = _outputs(model, rows)
    worst, typical, whole = _differences(before, after)
    limits = [(whole, LOOSE)]
    if exact:
        limits = [(typical, TIGHT), (whole, LOOSE)] if _has_experts(model) else [(worst, TIGHT)]
    for figure, limit in limits:
        # Written so that a difference that is not a number is refused as well.
        if not figure <= limit:
            raise AdapterError(
                f"{what} is refused: on {len(before)} tokens the outputs change by {figure:.2g} of their size when its "
                f"adapter and the earlier ones become one, and {limit:g} is the most that rounding explains; something "
                f"other than the B A of plain LoRA acts with them (a hook, a patched layer, a LoRA variant): remove it."
            )


def _last_tokens(sample: Any) -> Tensor:
    """The last token ids of a tokenised sample, without its padding; none where there are none."""
    if not isinstance(sample, Mapping) or "input_ids" not in sample:
        return torch.empty(0)
    ids = torch.as_tensor(sample["input_ids"])
    if "attention_mask" in sample and len(sample["attention_mask"]) == len(ids):
        ids = ids[torch.as_tensor(sample["attention_mask"]).bool()]
    return ids.long()[-LENGTH:] if ids.dim() == 1 else torch.empty(0)


def _outputs(model: nn.Module, rows: list[Tensor]) -> tuple[Tensor, bool]:
    """Outputs (n_tokens, at most about ``MOST_OUTPUTS``), float32 on the CPU, and whether all of it was computed in
    float32 there."""
    facts = ModelFacts.of(model)
    device = facts.device
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=facts.pad_token_id).to(device)
    real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    inputs = {"input_ids": ids, "attention_mask": real}
    # accelerate leaves its autocast around the forward, where only something inside of it can see it.
    mixed: list[bool] = []
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    handle = layer.register_forward_pre_hook(lambda *_: mixed.append(torch.is_autocast_enabled(device.type)))
    try:
        with torch.no_grad(), evaluation_mode(model):
            found = model(**inputs)[0]
    finally:
        handle.remove()
    found = found[real.bool()] if found.shape[:2] == real.shape else found.flatten(1)
    exact = device.type == "cpu" and not any(mixed) and _is_float32(model)
    return found[:, :: max(1, found.shape[1] // MOST_OUTPUTS)].float().cpu(), exact


def _is_float32(model: nn.Module) -> bool:
    """Whether every parameter is, or is quantised to compute in, float32."""
    return all(
        parameter.dtype in (torch.float32, torch.float64) or getattr(module, "compute_dtype", None) == torch.float32
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _has_experts(model: nn.Module) -> bool:
    config = ModelFacts.of(model).config.to_dict()
    return any("expert" in key and isinstance(count, int) and count > 1 for key, count in config.items())


def _differences(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Of the worst token, of the median one (over the median token's norm), and of all together."""
    # One number added to all logits of a token means nothing.
    before, after = (outputs - outputs.mean(dim=1, keepdim=True) for outputs in (before, after))
    change, size = (after - before).norm(dim=1), before.norm(dim=1).clamp(min=1e-30)
    errors = change / size.median()
    return float(errors.max()), float(errors.median()), float(change.norm() / size.norm())
