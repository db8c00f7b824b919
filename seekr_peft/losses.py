"""The terms of the replay loss, pure functions of tensors.

Paper: lambda1 * L_replay + (1 - lambda1) * L_logits + lambda2 * L_attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention.row_math import sparse_rows

IGNORED = -100
"""Label of a position that carries no loss (transformers' convention)."""


@dataclass(frozen=True)
class TeacherDistributions:
    """Teacher distributions over the vocabulary at the positions that predict the answer tokens.

    ``indices`` int64 and ``probabilities`` float (n_answer, k), ``remaining`` float (n_answer,): the largest entries
    and the mass of all others. Entries of probability 0 count as absent.
    """

    indices: Tensor
    probabilities: Tensor
    remaining: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, top_k: int, kept_mass: float = 1.0) -> TeacherDistributions:
        """The largest probabilities of ``logits`` (n_answer, vocabulary), as few as hold ``kept_mass`` of each position
        or, where that is more, ``top_k`` a position on average; exact when ``top_k`` covers the vocabulary."""
        return cls(**vars(sparse_rows({0: logits.double().softmax(dim=-1)}, top_k, kept_mass)[0]))


@dataclass(frozen=True)
class ReplayTerms:
    """The parts of one replay step's loss; scalars with a graph, or None where the method has no such part.

    ``total`` is the weighted sum that is trained on; ``replay`` (cross-entropy on the labels), ``logits`` and
    ``attention`` (KL divergences) are unweighted, in nats.
    """

    total: Tensor
    replay: Tensor | None = None
    logits: Tensor | None = None
    attention: Tensor | None = None

    def values(self) -> dict[str, Tensor]:
        """Detached unweighted terms under the names that logs and metrics use."""
        named = {
            "replay_loss": self.replay,
            "logits_loss": self.logits,
            "attention_loss": self.attention,
        }
        return {name: term.detach() for name, term in named.items() if term is not None}


def combine(
    replay: Tensor,
    logits: Tensor | None,
    attention: Tensor | None,
    lambda1: float,
    lambda2: float,
) -> ReplayTerms:
    """lambda1 * replay + (1 - lambda1) * logits + lambda2 * attention; without logits the labels weigh 1."""
    total = replay if logits is None else lambda1 * replay + (1 - lambda1) * logits
    if attention is not None:
        total = total + lambda2 * attention
    return ReplayTerms(total, replay, logits, attention)


def answer_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the answer tokens are predicted.

    A causal model predicts token t at position t - 1, so these are the positions *before* the labelled ones (the
    released code takes the labelled positions themselves and thereby never distils the first answer token).

    Args:
        labels: (batch, T) int64, ``IGNORED`` where there is no loss.

    Returns:
        ``(sample, position, target)``, int64 (n_answer,) each, in order of sample and position.
    """
    shifted = labels[:, 1:]
    sample, position = (shifted != IGNORED).nonzero(as_tuple=True)
    return sample, position, shifted[sample, position]


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of ``logits`` (n_answer, vocabulary) against ``targets`` (n_answer,)."""
    return F.cross_entropy(logits.float(), targets)


def logits_kl(logits: Tensor, teacher: TeacherDistributions) -> Tensor:
    """Mean over positions of KL(teacher || student), temperature 1, in nats.

    With a remaining mass the KL is over the partition {each stored token} + {all others}: a lower bound of the full
    KL, equal to it when the stored tokens cover the vocabulary.

    Args:
        logits: Student logits (n_answer, vocabulary).
        teacher: The teacher at the same positions; treated as a constant.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probabilities = logits.to(dtype).log_softmax(dim=-1)
    indices = teacher.indices.to(logits.device)
    kept = teacher.probabilities.to(logits.device, dtype)
    remaining = teacher.remaining.to(logits.device, dtype)
    kept_log = log_probabilities.gather(-1, indices)
    stored = torch.special.xlogy(kept, kept) - torch.where(kept > 0, kept * kept_log, 0)
    per_position = stored.sum(dim=-1)
    if (remaining > 0).any():
        # An absent entry (probability 0) is one of the others, whatever token its index names (padding names token 0).
        is_stored = torch.zeros_like(log_probabilities, dtype=torch.uint8)
        is_stored = is_stored.scatter_add(-1, indices, (kept > 0).to(torch.uint8)) > 0
        others = log_probabilities.masked_fill(is_stored, float("-inf")).logsumexp(dim=-1)
        rest = torch.special.xlogy(remaining, remaining) - remaining * others
        per_position = per_position + torch.where(remaining > 0, rest, 0)
    return per_position.mean()


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
