"""The terms of the replay loss, pure functions of tensors.

Paper: lambda1 * L_replay + (1 - lambda1) * L_logits + lambda2 * L_attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss_names import logged_name
from .sparse import SparseDistribution, compute_dtype, partition_kl


class Term(NamedTuple):
    """One part of a loss: its ``weight``, and its unweighted ``value``, a scalar with a graph."""

    weight: float
    value: Tensor


@dataclass(frozen=True)
class ReplayTerms:
    """The parts of one replay step's loss, by name; the names in logs, progress and report are made of these.

    The package's own are "replay" (cross-entropy on the labels), "logits" and "attention" (KL divergences), in nats. A
    method adds a part of its own by giving one more.
    """

    parts: Mapping[str, Term]

    @cached_property
    def total(self) -> Tensor:
        """The weighted sum that is trained on."""
        weighted = [weight * value for weight, value in self.parts.values()]
        return sum(weighted[1:], weighted[0])

    def values(self) -> dict[str, Tensor]:
        """Detached unweighted terms under the names that logs and metrics use."""
        return {logged_name(name): value.detach() for name, (_, value) in self.parts.items()}


def combine(
    replay: Tensor,
    logits: Tensor | None,
    attention: Tensor | None,
    lambda1: float,
    lambda2: float,
) -> ReplayTerms:
    """lambda1 * replay + (1 - lambda1) * logits + lambda2 * attention; without logits the labels weigh 1."""
    terms = {"replay": Term(1.0 if logits is None else lambda1, replay)}
    if logits is not None:
        terms["logits"] = Term(1 - lambda1, logits)
    if attention is not None:
        terms["attention"] = Term(lambda2, attention)
    return ReplayTerms(terms)


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of ``logits`` (n_answer, vocabulary) against ``targets`` (n_answer,)."""
    return F.cross_entropy(logits.float(), targets)


def logits_kl(logits: Tensor, teacher: SparseDistribution) -> Tensor:
    """Mean over positions of KL(teacher || student), temperature 1, in nats; see ``partition_kl``.

    Args:
        logits: Student logits (n_answer, vocabulary).
        teacher: The teacher at the same positions, (n_answer, k); treated as a constant.
    """
    log_probabilities = logits.to(compute_dtype(logits)).log_softmax(dim=-1)
    teacher = teacher.to(logits.device, log_probabilities.dtype)
    log_others = torch.zeros_like(teacher.remaining)
    if (teacher.remaining > 0).any():
        # An absent entry is one of the others, whatever token its index names (padding names token 0).
        is_stored = torch.zeros_like(log_probabilities, dtype=torch.uint8)
        present = (teacher.probabilities > 0).to(torch.uint8)
        is_stored = is_stored.scatter_add(-1, teacher.indices, present) > 0
        log_others = log_probabilities.masked_fill(is_stored, float("-inf")).logsumexp(dim=-1)
    return partition_kl(teacher, log_probabilities.gather(-1, teacher.indices), log_others).mean()


def softened_kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over positions of KL(softmax(teacher / t) || softmax(logits / t)), in nats; both (n_answer, vocabulary).

    The teacher is treated as a constant. Source: learning without forgetting (arXiv 1606.09282), equation 2, whose
    cross-entropy has the same gradient.
    """
    student_log = (logits.float() / temperature).log_softmax(dim=-1)
    teacher_log = (teacher.detach().float() / temperature).log_softmax(dim=-1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def answer_entropy(logits: Tensor) -> Tensor:
    """Entropy (nats) of each distribution in ``logits`` (n_answer, vocabulary): (n_answer,), float32."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
