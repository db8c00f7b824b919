"""What a finished task changed and what it leans on: forgettability, sensitivity and the teacher's signals.

Everything streams over the replay samples one at a time; nothing is kept between samples but sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionTap
from ..attention.capture import AttentionCall
from ..attention.rows import normalised
from ..config import Norm
from ..heads import HeadSelection
from ..losses import answer_entropy, label_loss
from ..memory import ReplaySample, TeacherSignals
from ..model.adapter_stack import AdapterStack
from ..model.answers import answer_logits, differentiable_input, evaluation_mode
from ..model.facts import ModelFacts
from ..sparse import SparseDistribution, sparse_rows

Progress = Callable[[], None]


@dataclass(frozen=True)
class HeadScores:
    """``forgettability`` and un-normalised ``sensitivity``, float64 (n_layers, n_heads): means over the samples."""

    forgettability: Tensor
    sensitivity: Tensor


def score_heads(
    stack: AdapterStack,
    samples: Sequence[ReplaySample],
    norm: Norm = "frobenius",
    every_query: bool = True,
    progress: Progress | None = None,
) -> HeadScores:
    """Score every head on the replay samples of the task that has just been trained.

    Forgettability: mean over samples of ||A^k - A^(k-1)||_F over the sample's queries, from two forwards with
    different adapters active. Sensitivity: mean over samples of ||dL/dA||_F over every query (or the same ones alone),
    where L is the sample's loss; from the gradient of each layer's attention output, so that no T x T array exists.
    ``norm="mean_square"`` takes the mean of squares over the sample's (queries x keys) instead. The released code's
    also counts masked future keys and padding, and always every query; nothing here does.

    Source: SEEKR (arXiv 2411.06171), section 3.2.
    """
    model = stack.model
    facts = ModelFacts.of(model)
    n_layers, n_heads = facts.head_shape
    heads = HeadSelection({layer: range(n_heads) for layer in facts.attention_layers})
    scores = torch.zeros(2, n_layers, n_heads, dtype=torch.float64)
    with evaluation_mode(model, checkpointing=True), stack.frozen():
        for sample in samples:
            with stack.before_task(), torch.no_grad():
                before = attention_rows(model, sample, heads)
            with stack.frozen():
                changes, squares = changes_and_gradients(model, sample, heads, before, every_query)
            n_keys, n_queries = len(sample.input_ids), len(sample.queries)
            for layer in heads:
                scores[0, layer] += _norm(changes[layer], n_queries * n_keys, norm)
                scores[1, layer] += _norm(squares[layer], (n_keys if every_query else n_queries) * n_keys, norm)
            if progress:
                progress()
    scores /= len(samples)
    return HeadScores(scores[0], scores[1])


def attention_rows(model: nn.Module, sample: ReplaySample, heads: HeadSelection) -> dict[int, Tensor]:
    """Rows of one sample by layer, (n_selected, n_queries, T) float32."""
    with AttentionTap(model, heads, queries=sample.queries[None]) as tap:
        _logits_of(model, sample)
        return {layer: rows[0] for layer, rows in tap.rows.items()}


@torch.no_grad()
def teach(
    model: nn.Module,
    samples: Sequence[ReplaySample],
    heads: HeadSelection,
    row_top_k: int,
    logit_top_k: int,
    kept_mass: float = 1.0,
    keep: Callable[[TeacherSignals], Any] = lambda signals: signals,
    progress: Progress | None = None,
) -> tuple[list[Any], float, float]:
    """Record the present model as the teacher of ``samples``.

    Args:
        heads: Whose rows to keep; empty for none.
        row_top_k: Entries kept per row, on average over a sample's rows; one row has at most ``BROADEST`` times as
            many.
        logit_top_k: The same of the answer distributions, on average over a sample's answer tokens; 0 keeps no logits.
        kept_mass: Share of each row's and distribution's mass that is enough where more entries were allowed.
        keep: What to keep of each sample's signals, such as ``PackedSignals.of``: as they are they take ten times the
            room, padded to the broadest.

    Returns:
        What ``keep`` gave of each sample's signals (on the CPU), the mean loss and the mean answer entropy, both in
        nats per answer token.
    """
    signals, losses, entropies, n_answers = [], [], [], 0
    with evaluation_mode(model):
        for sample in samples:
            with AttentionTap(model, heads, queries=sample.queries[None]) as tap:
                logits, targets = _logits_of(model, sample)
                exact = {layer: normalised(rows[0]) for layer, rows in tap.rows.items()}
            rows = {
                layer: kept.to(torch.device("cpu")) for layer, kept in sparse_rows(exact, row_top_k, kept_mass).items()
            }
            distributions = None
            if logit_top_k:
                distributions = SparseDistribution.from_logits(logits.cpu(), logit_top_k, kept_mass)
            signals.append(keep(TeacherSignals(rows, distributions)))
            losses.append(label_loss(logits, targets).cpu() * len(targets))
            entropies.append(answer_entropy(logits).sum().cpu())
            n_answers += len(targets)
            if progress:
                progress()
    return signals, float(sum(losses)) / n_answers, float(sum(entropies)) / n_answers


def changes_and_gradients(
    model: nn.Module, sample: ReplaySample, heads: HeadSelection, before: dict[int, Tensor], every_query: bool
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Per layer the sums of squares of A^k - A^(k-1) and of dL/dA for each head, (n_heads,).

    Rows after the task are compared with ``before`` layer by layer and not kept; each layer's ``before`` is dropped
    once it was used.
    """

    def change(layer: int, call: AttentionCall) -> Tensor:
        if layer not in before:
            # Activation checkpointing recomputes the layer; the value of the first time counts.
            return torch.zeros(len(heads[layer]))
        with torch.no_grad():
            return (call.rows()[0] - before.pop(layer)).square().sum(dim=(-1, -2))

    with (
        torch.enable_grad(),
        differentiable_input(model),
        AttentionTap(
            model,
            heads,
            queries=sample.queries[None],
            observe=change,
            squares="every" if every_query else "selected",
        ) as tap,
    ):
        squares = tap.gradient_squares(label_loss(*_logits_of(model, sample)))
        return dict(tap.values), {layer: of_sample[0].cpu() for layer, of_sample in squares.items()}


def _logits_of(model: nn.Module, sample: ReplaySample) -> tuple[Tensor, Tensor]:
    input_ids = sample.input_ids[None].to(ModelFacts.of(model).device)
    return answer_logits(model, input_ids, torch.ones_like(input_ids), sample.labels[None].to(input_ids.device))


def _norm(squares: Tensor, entries: int, norm: Norm) -> Tensor:
    squares = squares.double().cpu()
    return squares.sqrt() if norm == "frobenius" else squares / entries
