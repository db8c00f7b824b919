"""Which heads matter: ``HeadSelection`` and the importance that ranks them.

Everything here is arithmetic on tensors of shape ``(n_layers, n_heads)``; no model is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import Accumulate, HeadChoice, LayerChoice, budget_count
from .errors import ConfigError


class HeadSelection(Mapping[int, tuple[int, ...]]):
    """Selected query heads: a read-only mapping of layer index to sorted head indices.

    Under grouped-query attention a head is a *query* head. Layers without heads are left out.

    Raises:
        ConfigError: A layer or head index is negative or not a whole number.
    """

    def __init__(self, heads: Mapping[int, Sequence[int]]) -> None:
        self._heads = {
            _index(layer, "layer"): tuple(sorted({_index(head, "head") for head in indices}))
            for layer, indices in sorted(heads.items())
            if len(indices)
        }

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return self._heads[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __repr__(self) -> str:
        return f"HeadSelection({ {layer: list(heads) for layer, heads in self.items()} })"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSelection) and self._heads == other._heads

    def __hash__(self) -> int:
        return hash(tuple(self._heads.items()))

    @property
    def n_heads(self) -> int:
        """Number of selected heads over all layers."""
        return sum(len(heads) for heads in self._heads.values())

    @classmethod
    def all(cls, n_layers: int, n_heads: int) -> HeadSelection:
        """Every head of every layer."""
        return cls({layer: range(n_heads) for layer in range(n_layers)})

    @classmethod
    def top(
        cls,
        importance: Tensor,
        layer_budget: int | float | None = None,
        head_budget: int | float | None = None,
        layer_choice: LayerChoice = "anywhere",
    ) -> HeadSelection:
        """The most important heads of the most important layers.

        First the ``layer_budget`` layers with the largest sum over their heads are kept, then the ``head_budget``
        heads with the largest importance *over all the heads of those layers together*. Ties go to the lower index,
        so that a selection is reproducible.

        Args:
            importance: ``(n_layers, n_heads)``, any real dtype, finite.
            layer_budget: A count, a share in (0, 1] of the layers, or None for all.
            head_budget: A count, a share in (0, 1] of **all** the model's heads, or None for all of the kept layers.
            layer_choice: "thirds" takes the layers in turn from the upper, middle and lower third of ``importance``.

        Raises:
            ConfigError: The tensor is not two-dimensional, or has a value that is not finite.

        Source: SEEKR (arXiv 2411.06171), hierarchical budget allocation.
        """
        scores = _checked_importance(importance)
        n_layers, n_heads = scores.shape
        ranked = _in_turn_from_thirds(scores.sum(dim=1)) if layer_choice == "thirds" else _largest(scores.sum(dim=1))
        layers = sorted(ranked[: budget_count(layer_budget, n_layers)])
        candidates = scores[layers].flatten()
        count = min(budget_count(head_budget, n_layers * n_heads), candidates.numel())
        if head_budget is None:
            count = candidates.numel()
        heads: dict[int, list[int]] = {}
        for flat in _largest(candidates)[:count]:
            heads.setdefault(layers[flat // n_heads], []).append(flat % n_heads)
        return cls(heads)

    def mask(self, n_layers: int, n_heads: int) -> Tensor:
        """Boolean ``(n_layers, n_heads)``, True where selected."""
        chosen = torch.zeros(n_layers, n_heads, dtype=torch.bool)
        for layer, heads in self.items():
            chosen[layer, list(heads)] = True
        return chosen

    def to_json(self) -> dict[str, list[int]]:
        """Layer (as text) to heads, for JSON."""
        return {str(layer): list(heads) for layer, heads in self.items()}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Sequence[int]]) -> HeadSelection:
        """Read what ``to_json`` wrote."""
        return cls({int(layer): heads for layer, heads in mapping.items()})


def normalise_per_layer(sensitivity: Tensor) -> Tensor:
    """Divide each layer's row of ``(n_layers, n_heads)`` by its sum; a row of zeros stays zero, NaN stays NaN."""
    totals = sensitivity.sum(dim=1, keepdim=True)
    return torch.where(totals == 0, 0, sensitivity / totals)


@dataclass(frozen=True)
class ImportanceRecord:
    """Forgettability and sensitivity of every finished task, float64 ``(n_layers, n_heads)`` each.

    ``sensitivity`` is already normalised within each layer.
    """

    forgettability: list[Tensor] = field(default_factory=list)
    sensitivity: list[Tensor] = field(default_factory=list)

    def extended(self, forgettability: Tensor, sensitivity: Tensor) -> ImportanceRecord:
        """A new record with one more task; the sensitivity is normalised per layer here."""
        return ImportanceRecord(
            [*self.forgettability, forgettability.double().cpu()],
            [*self.sensitivity, normalise_per_layer(sensitivity.double().cpu())],
        )

    def total_forgettability(self) -> Tensor:
        """Sum over tasks."""
        return torch.stack(self.forgettability).sum(dim=0)

    def total_sensitivity(self) -> Tensor:
        """Sum over tasks of the per-layer normalised sensitivity."""
        return torch.stack(self.sensitivity).sum(dim=0)

    def importance(self, accumulate: Accumulate = "product_of_sums") -> Tensor:
        """``(sum S) * (sum F)`` (the paper) or ``sum (S * F)`` (the released code)."""
        if accumulate == "product_of_sums":
            return self.total_sensitivity() * self.total_forgettability()
        pairs = zip(self.sensitivity, self.forgettability, strict=True)
        return torch.stack([sensitivity * change for sensitivity, change in pairs]).sum(dim=0)

    def select(
        self,
        choice: HeadChoice,
        layer_budget: int | float | None,
        head_budget: int | float | None,
        *,
        accumulate: Accumulate = "product_of_sums",
        layer_choice: LayerChoice = "anywhere",
        seed: int = 0,
        layers: Sequence[int] | None = None,
    ) -> HeadSelection:
        """Select heads by ``choice`` under the two budgets; "random" ranks by a seeded draw, "all" ignores both.

        ``layers`` are those that have attention heads (hybrid models have others between); None means every layer.
        """
        n_layers, n_heads = self.forgettability[-1].shape
        present = list(range(n_layers)) if layers is None else sorted(layers)
        if choice == "all":
            return HeadSelection({layer: range(n_heads) for layer in present})
        if choice == "random":
            generator = torch.Generator().manual_seed(seed)
            scores = torch.rand(n_layers, n_heads, generator=generator, dtype=torch.float64)
        elif choice == "sensitivity":
            scores = self.total_sensitivity()
        elif choice == "forgettability":
            scores = self.total_forgettability()
        else:
            scores = self.importance(accumulate)
        chosen = HeadSelection.top(scores[present], layer_budget, head_budget, layer_choice)
        return HeadSelection({present[place]: heads for place, heads in chosen.items()})


def _largest(scores: Tensor) -> list[int]:
    """Indices by falling score."""
    # A stable descending sort leaves ties in index order.
    return torch.sort(scores, descending=True, stable=True).indices.tolist()


def _in_turn_from_thirds(totals: Tensor) -> list[int]:
    """Layers in rounds: the best of each third of the depth, then the second best of each, and so on."""
    places = torch.arange(len(totals)).tensor_split(3)
    ranked = [[int(third[i]) for i in _largest(totals[third])] for third in places if len(third)]
    rounds = [[third[i] for third in ranked if i < len(third)] for i in range(max(map(len, ranked)))]
    return [layer for chosen in rounds for layer in sorted(chosen, key=lambda layer: (-float(totals[layer]), layer))]


def _checked_importance(importance: Tensor) -> Tensor:
    if importance.dim() != 2 or 0 in importance.shape:
        raise ConfigError(
            f"importance must have shape (n_layers, n_heads) with at least one of each, got {tuple(importance.shape)}."
        )
    scores = importance.detach().double().cpu()
    if not torch.isfinite(scores).all():
        layer, head = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ConfigError(f"importance must be finite, got {scores[layer, head].item()} at layer {layer}, head {head}.")
    return scores


def _index(value: int, what: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigError(f"a {what} index must be a whole number of at least 0, got {value!r}.")
    return number
