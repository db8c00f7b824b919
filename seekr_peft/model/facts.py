"""What the package asks a transformers model about itself: ``ModelFacts``, the same questions for every caller."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.models import attention_modules, base_transformer, head_shape


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a causal language model; ``ModelFacts.of(model)`` looks through PEFT's and other wrappers.

    Each fact is read when it is asked for: a Trainer moves the model after a method was made with it, and a
    configuration's padding token may be set late.

    Attributes:
        root: The transformers model itself.
    """

    root: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """Of ``model``: a transformers model, or a PeftModel, DistributedDataParallel or torch.compile around one."""
        return cls(base_transformer(model))

    @property
    def config(self) -> Any:
        """The configuration of the part that reads text."""
        return self.root.config.get_text_config()

    @property
    def model_type(self) -> str:
        """Name of the family."""
        return str(self.config.model_type)

    @property
    def vocabulary(self) -> int:
        """Tokens that a distribution of answers is over, by the configuration."""
        return int(self.config.vocab_size)

    @property
    def embedding_rows(self) -> int:
        """Token ids that the model has both an input and an output embedding for."""
        rows = int(self.input_embeddings.weight.shape[0])
        return min(rows, int(getattr(self.root.get_output_embeddings(), "out_features", rows)))

    @property
    def input_embeddings(self) -> Any:
        """The module that token ids enter by."""
        return self.root.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids have to be."""
        device: torch.device = self.input_embeddings.weight.device
        return device

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have at most; None where the architecture sets no bound."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def pad_token_id(self) -> int:
        """What to pad token ids with: the model's own padding token, or 0 where it has none (or -1, as some say
        none)."""
        found = getattr(self.config, "pad_token_id", None)
        return found if isinstance(found, int) and found >= 0 else 0

    @property
    def input_names(self) -> frozenset[str]:
        """Names that the transformers model's forward takes."""
        return frozenset(inspect.signature(self.root.forward).parameters)

    @property
    def keeps_logits(self) -> bool:
        """Whether the forward computes logits only where it is told to."""
        return "logits_to_keep" in self.input_names

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with softmax attention, in order; CaptureError where there are none."""
        return tuple(sorted(attention_modules(self.root)))

    @property
    def head_shape(self) -> tuple[int, int]:
        """``(n_layers, n_heads)``: the attention layers up to the last one, and query heads per layer."""
        return head_shape(self.root)
