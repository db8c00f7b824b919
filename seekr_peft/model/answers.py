"""One forward of a causal model that returns logits only where an answer token is predicted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attention.models import base_transformer
from ..losses import answer_positions


def answer_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``model`` on (batch, T) inputs.

    Returns:
        ``(logits, targets)``: (n_answer, vocabulary) in the model's dtype and (n_answer,) int64, in order of sample
        and position. The LM head runs only on the columns in which some sample predicts an answer token.
    """
    sample, position, targets = answer_positions(labels)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if not _keeps_logits(model):
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

    handle = base_transformer(model).get_input_embeddings().register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def _own_dropout(module: nn.Module) -> bool:
    """Whether a layer may drop values in its own forward: some (OPT) keep a rate, not a Dropout module."""
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())


def model_device(model: nn.Module) -> torch.device:
    """Device of the input embeddings."""
    return base_transformer(model).get_input_embeddings().weight.device


def pad_token_id(model: nn.Module) -> int:
    """What to pad token ids with: the model's own padding token, or 0 where it has none (or -1, as some say none)."""
    found = getattr(base_transformer(model).config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def input_names(model: nn.Module) -> frozenset[str]:
    """Names that the transformers model's forward takes."""
    return frozenset(inspect.signature(base_transformer(model).forward).parameters)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in input_names(model)
