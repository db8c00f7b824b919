"""Several low-rank adapters as one: the factors of their sum, cut to a rank, and what the cut discards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .lora_layers import lora_layers

RankLimit = int | Literal["auto"] | None
"""Largest rank of the sum of the earlier adapters: "auto" is ``AUTO_TASKS`` times an adapter's own, None no limit."""


AUTO_TASKS = 8
"""So many tasks are summed exactly by default; without a limit the step and the files grow with every further one."""


@dataclass(frozen=True)
class Consolidation:
    """How the earlier adapters became one: its ``rank``, and the share of squared singular values that was discarded
    (0.0 for exact concatenation) over all modules together and in the worst module."""

    rank: int
    discarded_energy: float
    worst_module_energy: float


def resolved_rank_limit(rank_limit: RankLimit, r: int) -> int | None:
    """The limit as a number, or None, for adapters of rank ``r``."""
    return AUTO_TASKS * r if rank_limit == "auto" else rank_limit


def summed_factors(layer: LoraLayer, names: list[str]) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), float32, with B A equal to the sum of the scaled adapters, exactly."""
    present = [name for name in names if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight.float() * layer.scaling[name] for name in present])
    b = torch.cat([layer.lora_B[name].weight.float() for name in present], dim=1)
    return a.detach(), b.detach()


def cut_to_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Best rank-``rank`` approximation of B A, the energy (sum of squared singular values) lost, and all of it.

    Through the small factors: B = Q_b R_b, A^T = Q_a R_a, so only R_b R_a^T (rank x rank) needs an SVD.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, singular, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = singular[:rank].sqrt()
    new_b = q_b @ left[:, :rank] * root
    new_a = root[:, None] * (right[:rank] @ q_a.T)
    energy = singular.square()
    return new_a.float(), new_b.float(), float(energy[rank:].sum()), float(energy.sum())


def fill_adapter(model: nn.Module, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for path, layer in lora_layers(model):
            a, b = factors[path]
            weight_a, weight_b = layer.lora_A[name].weight, layer.lora_B[name].weight
            # Ranks differ between modules under a rank_pattern: the rest stays zero.
            weight_a.zero_()[: a.shape[0]].copy_(a)
            weight_b.zero_()[:, : b.shape[1]].copy_(b)
