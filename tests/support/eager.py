"""What eager attention computes: the reference of the tap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def eager_rows(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """(batch, heads, T, T) of each layer, as the model itself reports them."""
    with torch.no_grad():
        attentions = model(**batch, **options, output_attentions=True).attentions
    assert attentions and all(attention.dim() == 4 for attention in attentions)
    return attentions


def expected_rows(eager: Tensor, batch: dict[str, Tensor], heads: tuple[int, ...], queries: Tensor | None) -> Tensor:
    """The chosen rows one by one, 0 where the query is padding."""
    mask = batch["attention_mask"]
    n_samples, _, length, _ = eager.shape
    if queries is None:
        queries = torch.arange(length).repeat(n_samples, 1)
    rows = torch.zeros(n_samples, len(heads), queries.shape[1], length)
    for sample in range(n_samples):
        for i, head in enumerate(heads):
            for j, query in enumerate(queries[sample].tolist()):
                if mask[sample, query]:
                    rows[sample, i, j] = eager[sample, head, query]
    return rows
