"""The one place that reaches into bitsandbytes. Verified with bitsandbytes 0.50.2."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PACKING = "support_avx512bf16_for_cpu"
"""The layer's own switch for repacking its weight at the first forward in eval mode; off, it acts as on other CPUs."""


def keep_differentiable(model: nn.Module) -> None:
    """Keep ``model``'s 4-bit layers trainable on CPUs with AVX512-BF16, whatever was or will be generated with it.

    There bitsandbytes repacks the 4-bit weight at the first forward in eval mode without a gradient, and from then on
    uses an inference kernel that has no backward: training goes on with a wrong gradient and only a warning from
    autograd (measured: no task after the first generation is learnt). So the repacking is switched off, and undone
    where it has happened; its rounding of the block scales to bfloat16 (relative error up to 2^-9) stays.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return
    n_unpacked = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and hasattr(module, _PACKING):
            setattr(module, _PACKING, False)
            n_unpacked += _unpack(module)
    if n_unpacked:
        logger.warning(
            "%d 4-bit layers had been repacked for inference by an earlier forward in eval mode and were unpacked to "
            "train; their block scales are rounded to bfloat16 now. Hand the model over before its first generation "
            "to avoid that.",
            n_unpacked,
        )


def scales(parameter: Tensor) -> list[Tensor]:
    """What the packed numbers of a quantised ``parameter`` are multiplied by, in the floating-point tensors there are;
    none of another's."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    parts = (
        getattr(state, "absmax", None),
        getattr(nested, "absmax", None),
        getattr(state, "offset", None),
        # Of an 8-bit one.
        getattr(parameter, "SCB", None),
    )
    return [part for part in parts if isinstance(part, Tensor)]


def lacks_outer_scales(parameter: Tensor) -> bool:
    """Whether the scales of a 4-bit ``parameter`` are packed numbers themselves, with nothing to multiply them by.

    bitsandbytes (0.50) takes double quantisation for single where its file has no ``nested_absmax``, and goes on.
    """
    state = getattr(parameter, "quant_state", None)
    absmax = getattr(state, "absmax", None)
    return isinstance(absmax, Tensor) and not absmax.is_floating_point() and getattr(state, "state2", None) is None


def _unpack(layer: Any) -> bool:
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return False
    layer.state_dict()  # unpacks the weight in place as a side effect
    if not state.original_nested:
        # Single quantisation: the scales are left as they were packed, transposed and in bfloat16.
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    return True
