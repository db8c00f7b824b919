"""Which models can be tapped and by which door. Reaches into transformers; verified with transformers 5.23.

What is relied on, beyond the public API: every attention module carries its ``layer_idx``; those that dispatch
read their ``config._attn_implementation`` at call time to pick the attention function, and their modelling file
imports ``ALL_ATTENTION_FUNCTIONS``; a checkpointed layer keeps ``_gradient_checkpointing_func``. The tests notice
when one of these changes. May import ``errors``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..errors import CaptureError

EAGER = "eager"


@dataclass(frozen=True)
class _Structure:
    """What a walk over all modules below the root found; walks before every forward would take 1.4 % of a small model's
    step. Weak references only: a module may lead back to the root, whose end is the end of this."""

    attention: list[tuple[str, int, ref[nn.Module]]]
    """Path, layer index and module."""
    lists: dict[str, list[ref[nn.Module]]]
    recomputable: list[ref[nn.Module]]

    def holds(self, root: nn.Module) -> bool:
        """False when an attention module, its layer index or the layers of some list have changed."""
        try:
            for path, layer, module in self.attention:
                found = root.get_submodule(path)
                if found is not module() or getattr(found, "layer_idx", None) != layer:
                    return False
            for path, members in self.lists.items():
                now = list(root.get_submodule(path).children())
                if len(now) != len(members) or any(a is not b() for a, b in zip(now, members, strict=True)):
                    return False
        except AttributeError:
            return False
        return True


_STRUCTURES: WeakKeyDictionary[nn.Module, _Structure] = WeakKeyDictionary()


def base_transformer(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, DistributedDataParallel or torch.compile wrapper."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules of the language model by layer index.

    Raises:
        CaptureError: The model has none (state-space models), or several per layer (encoder-decoders).
    """
    root = base_transformer(model)
    name = type(root).__name__
    modules: dict[int, nn.Module] = {}
    for path, layer, module in _structure(root).attention:
        if layer in modules:
            raise CaptureError(
                f"{name} has more than one self-attention module with layer index {layer} (the second is "
                f"{path}); encoder-decoder models are not supported, use a decoder-only or encoder-only model."
            )
        modules[layer] = _alive(module)
    if not modules:
        raise CaptureError(
            f"{name} has no softmax attention module that carries a layer index, so there is no attention to distil; "
            f"use a model with attention layers, or method 'replay', which needs none."
        )
    return modules


def head_shape(model: nn.Module) -> tuple[int, int]:
    """``(n_layers, n_heads)``: the attention layers up to the last one, and query heads per layer."""
    modules = attention_modules(model)
    config = base_transformer(model).config.get_text_config()
    return max(modules) + 1, int(config.num_attention_heads)


def implementation(module: nn.Module) -> str:
    """Name of the attention function that ``module`` dispatches to ("sdpa", "flash_attention_2", "eager" ...)."""
    config = getattr(module, "config", None)
    # A module without a configuration (Bloom) has nothing to dispatch on.
    return EAGER if config is None else config._attn_implementation or EAGER


def attention_functions(module: nn.Module) -> Any:
    """The table of attention functions that this module's modelling file looks names up in at call time, or None. An
    entry that is set there goes before the library's own, and deleting it brings that back."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def uses_reentrant_checkpointing(model: nn.Module, in_any_mode: bool = False) -> bool:
    """True when some layer recomputes its forward by reentrant activation checkpointing; ``in_any_mode`` also counts
    those that will only in training mode."""
    for found in _structure(base_transformer(model)).recomputable:
        module = found()
        if module is None:
            continue
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if not ((module.training or in_any_mode) and getattr(module, "gradient_checkpointing", False) and checkpoint):
            continue
        # torch's own default is reentrant, so a call that does not say so is as well.
        if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant") is not False:
            return True
    return False


def drops_attention(module: nn.Module) -> bool:
    """True when the module's eager weights are changed by dropout in its present mode."""
    if not module.training:
        return False
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        rate = getattr(module, name, 0.0)
        rate = rate.p if isinstance(rate, nn.Dropout) else rate
        if isinstance(rate, float) and rate > 0:
            return True
    return False


def is_causal(module: nn.Module, flag: bool | None) -> bool:
    """Whether a call without a mask is causal, by transformers' own rule."""
    return bool(flag if flag is not None else getattr(module, "is_causal", True))


def is_encoder(model: nn.Module) -> bool:
    """Whether some attention layer of ``model`` looks at later positions too, by its own ``is_causal``."""
    modules = [module for module in base_transformer(model).modules() if _is_self_attention(module)]
    return any(not is_causal(module, None) for module in modules)


def _structure(root: nn.Module) -> _Structure:
    """Of the transformers model ``root``; looked up where it has not changed."""
    found = _STRUCTURES.get(root)
    if found is None or not found.holds(root):
        found = _STRUCTURES[root] = _walk(root)
    return found


def _walk(root: nn.Module) -> _Structure:
    attention, lists, recomputable = [], {}, []
    for path, module in root.named_modules():
        if _is_self_attention(module):
            attention.append((path, int(module.layer_idx), ref(module)))
        if isinstance(module, nn.ModuleList):
            lists[path] = [ref(member) for member in module.children()]
        if hasattr(module, "gradient_checkpointing"):
            recomputable.append(ref(module))
    return _Structure(attention, lists, recomputable)


def _alive(module: ref[nn.Module]) -> nn.Module:
    """``holds`` has just found it in the model."""
    found = module()
    assert found is not None
    return found


def _is_self_attention(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    name = type(module).__name__
    if "Attention" not in name or "Cross" in name or getattr(module, "is_cross_attention", False):
        return False
    # The innermost module with a layer index is the one that calls the attention function.
    return not any(
        isinstance(getattr(child, "layer_idx", None), int) and "Attention" in type(child).__name__
        for child in module.modules()
        if child is not module
    )


def flex_allowed(block_mask: Any, queries: torch.Tensor, n_heads: int, n_keys: int) -> torch.Tensor:
    """Evaluate a flex-attention BlockMask at ``queries`` (batch, n_queries): bool (batch, 1, n_queries, n_keys)."""
    batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=queries.device)
    keys = torch.arange(n_keys, device=queries.device)[None, None, :]
    allowed = block_mask.mask_mod(batch, head, queries[:, :, None], keys)
    return allowed.expand(queries.shape[0], queries.shape[1], n_keys)[:, None]
