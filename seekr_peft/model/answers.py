"""A model's answers: where they stand, the logits that predict them, and the modes in which they are computed.

Nothing else in the package shifts labels, so what another kind of model does otherwise (an encoder-decoder predicts a
label at its own place) is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ..tasks.tokenize import IGNORED_LABEL
from .facts import ModelFacts


class Answers(NamedTuple):
    """Where the answer tokens of a batch are predicted, and which they are: int64 (n_answer,) each, in order of sample
    and position."""

    sample: Tensor
    position: Tensor
    target: Tensor


def answer_positions(labels: Tensor) -> Answers:
    """Where the answer tokens are predicted.

    A causal model predicts token t at position t - 1, so these are the positions *before* the labelled ones (the
    released code takes the labelled positions themselves and thereby never distils the first answer token).

    Args:
        labels: (batch, T) int64, ``IGNORED_LABEL`` where there is no loss.
    """
    shifted = labels[:, 1:]
    sample, position = (shifted != IGNORED_LABEL).nonzero(as_tuple=True)
    return Answers(sample, position, shifted[sample, position])


def count_answers(labels: Tensor) -> int:
    """Number of answer tokens that a sample with ``labels`` (T,) predicts."""
    return len(answer_positions(labels[None]).target)


def answer_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``model`` on (batch, T) inputs.

    Returns:
        ``(logits, targets)``: (n_answer, vocabulary) in the model's dtype and (n_answer,) int64, in order of sample
        and position. The LM head runs only on the columns in which some sample predicts an answer token.
    """
    sample, position, targets = answer_positions(labels)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if not ModelFacts.of(model).keeps_logits:
        return model(**inputs).logits[sample, position], targets
    columns, place = position.unique(return_inverse=True)
    logits = model(**inputs, logits_to_keep=columns).logits
    return logits[sample, place], targets


@contextmanager
def evaluation_mode(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Dropout off inside; each module's own mode is restored on exit.

    With ``checkpointing``, layers for which activation checkpointing was switched on keep it for a backward inside
    (transformers recomputes only layers in training mode), unless they apply dropout themselves.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    if checkpointing:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) and not _own_dropout(module):
                # The layer alone: what is inside it stays in evaluation mode.
                module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def differentiable_input(model: nn.Module) -> Iterator[None]:
    """With every parameter frozen, a graph exists only if the embedded input requires a gradient: inside it does."""

    def watch(module: nn.Module, args: object, output: Tensor) -> Tensor:
        # Some models (CTRL) scale what they embedded in place, which torch forbids for a leaf.
        return output.requires_grad_().clone()

    handle = ModelFacts.of(model).input_embeddings.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def _own_dropout(module: nn.Module) -> bool:
    """Whether a layer may drop values in its own forward: some (OPT) keep a rate, not a Dropout module."""
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())
