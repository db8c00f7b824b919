"""Which models can be tapped and by which door. Reaches into transformers; verified with transformers 5.23.

What is relied on, beyond the public API: attention modules are named so and carry their layer's index (GPT-Neo under
a name of its own, OpenAI's GPT by its place in the list of layers only); those that dispatch read their
``config._attn_implementation`` at call time to pick the attention function, which their forward looks up in its
modelling file's ``ALL_ATTENTION_FUNCTIONS``; a checkpointed layer keeps ``_gradient_checkpointing_func``. The tests
notice when one of these changes.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..errors import CaptureError

EAGER = "eager"

_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_INDEX_NAMES = ("layer_idx", "layer_id")
_DROPOUT_NAMES = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")


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
                if found is not module() or _own_index(found) not in (None, layer):
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
    if not has_attention(root):
        raise CaptureError(
            f"{name} has no softmax attention module that belongs to one layer, so there is no attention to distil; "
            f"use a model with attention layers, or method 'replay', which needs none."
        )
    modules: dict[int, nn.Module] = {}
    for path, layer, module in _structure(root).attention:
        if layer in modules:
            raise CaptureError(
                f"{name} has more than one self-attention module with layer index {layer} (the second is "
                f"{path}), as encoder-decoders have; use a model with one in each layer."
            )
        modules[layer] = _alive(module)
    return modules


def has_attention(model: nn.Module) -> bool:
    """Whether ``model`` has softmax attention that belongs to its layers."""
    root = base_transformer(model)
    return bool(_structure(root).attention) and _n_heads(root) is not None


def head_shape(model: nn.Module) -> tuple[int, int]:
    """``(n_layers, n_heads)``: the attention layers up to the last one, and query heads per layer."""
    return max(attention_modules(model)) + 1, int(_n_heads(base_transformer(model)) or 0)


def check_capture(model: nn.Module) -> None:
    """Refuse, before anything is trained, a model whose attention cannot be captured while it trains.

    Raises:
        CaptureError: There is no attention, its kernel cannot be tapped, or eager weights would suffer dropout.
    """
    for layer, module in attention_modules(model).items():
        if implementation(module) != EAGER and not _dispatches(module):
            raise CaptureError(untapped(layer, module))
        if implementation(module) == EAGER and drops_attention(module, in_any_mode=True):
            raise CaptureError(dropped(layer, module))


def untapped(layer: int, module: nn.Module) -> str:
    """The sentence on a kernel without a door."""
    return (
        f"layer {layer} ({type(module).__name__}) computes its attention without transformers' attention interface, so "
        f"it cannot be tapped; load the model with attn_implementation='eager'."
    )


def dropped(layer: int, module: nn.Module) -> str:
    """The sentence on eager weights after dropout."""
    return (
        f"layer {layer} ({type(module).__name__}) applies attention dropout, so its eager weights are no distribution; "
        f"set the attention dropout of the model's configuration to 0, or use attn_implementation='sdpa' if the model "
        f"has it."
    )


def implementation(module: nn.Module) -> str:
    """Name of the attention function that ``module`` dispatches to ("sdpa", "flash_attention_2", "eager" ...)."""
    config = getattr(module, "config", None)
    # A module without a configuration (Bloom) has nothing to dispatch on.
    return EAGER if config is None else config._attn_implementation or EAGER


def attention_functions(module: nn.Module) -> Any:
    """The table of attention functions that this module's modelling file looks names up in at call time, or None. An
    entry that is set there goes before the library's own, and deleting it brings that back."""
    return getattr(sys.modules[type(module).__module__], _FUNCTIONS, None)


def looks_functions_up(model_class: type[nn.Module]) -> bool:
    """Whether attention modules of ``model_class`` take their function from a table that others may be put into."""
    return hasattr(sys.modules[model_class.__module__], _FUNCTIONS)


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


def drops_attention(module: nn.Module, in_any_mode: bool = False) -> bool:
    """True when the module's eager weights are changed by dropout in its present mode; ``in_any_mode``: in training."""
    if not (module.training or in_any_mode):
        return False
    for name in _DROPOUT_NAMES:
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
    return any(not is_causal(_alive(module), None) for *_, module in _structure(base_transformer(model)).attention)


def _structure(root: nn.Module) -> _Structure:
    """Of the transformers model ``root``; looked up where it has not changed."""
    found = _STRUCTURES.get(root)
    if found is None or not found.holds(root):
        found = _STRUCTURES[root] = _walk(root)
    return found


def _walk(root: nn.Module) -> _Structure:
    lists, recomputable = {}, []
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList):
            lists[path] = [ref(member) for member in module.children()]
        if hasattr(module, "gradient_checkpointing"):
            recomputable.append(ref(module))
    attention = [(path, layer, ref(module)) for path, layer, module in _self_attention(root)]
    return _Structure(attention, lists, recomputable)


def _self_attention(root: nn.Module) -> list[tuple[str, int, nn.Module]]:
    """Path, layer and module of what computes the attention of each layer."""
    named = {path: module for path, module in root.named_modules() if _is_attention(module)}
    indices = {path: _own_index(module) for path, module in named.items()}
    if all(index is None for index in indices.values()):
        indices = {path: _place_in_list(path) for path in named}
    found = {path: index for path, index in indices.items() if index is not None}
    # Of modules in each other the innermost calls the attention function.
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    inner = [(path, index, named[path]) for path, index in found.items() if path not in outer]
    # A family's file whose one kind of layer dispatches has others (MiniMax, Kimi) for linear attention, without rows.
    files = {type(module).__module__ for *_, module in inner if _dispatches(module)}
    return [entry for entry in inner if _dispatches(entry[2]) or type(entry[2]).__module__ not in files]


def _alive(module: ref[nn.Module]) -> nn.Module:
    """``holds`` has just found it in the model."""
    found = module()
    assert found is not None
    return found


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Attention" in name and "Cross" not in name and not getattr(module, "is_cross_attention", False)


def _own_index(module: nn.Module) -> int | None:
    """The layer that ``module`` says it belongs to."""
    found = (getattr(module, name, None) for name in _INDEX_NAMES)
    return next((index for index in found if isinstance(index, int)), None)


def _place_in_list(path: str) -> int | None:
    """The place of the layer that ``path`` leads through in its list: of the innermost one, if there are several."""
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    return numbers[-1] if numbers else None


def _dispatches(module: nn.Module) -> bool:
    """Whether the module's forward looks its function up in the table."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return attention_functions(module) is not None and code is not None and _FUNCTIONS in code.co_names


def _n_heads(root: nn.Module) -> int | None:
    """None of models (RWKV) that call something else attention and count no heads."""
    return getattr(root.config.get_text_config(), "num_attention_heads", None)


def flex_allowed(block_mask: Any, queries: torch.Tensor, n_heads: int, n_keys: int) -> torch.Tensor:
    """Evaluate a flex-attention BlockMask at ``queries`` (batch, n_queries): bool (batch, 1, n_queries, n_keys)."""
    batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=queries.device)
    keys = torch.arange(n_keys, device=queries.device)[None, None, :]
    allowed = block_mask.mask_mod(batch, head, queries[:, :, None], keys)
    return allowed.expand(queries.shape[0], queries.shape[1], n_keys)[:, None]
