"""``ContinualSFTTrainer``: TRL's SFTTrainer whose steps also replay. Needs the ``trl`` extra."""

from __future__ import annotations

from typing import Any

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("ContinualSFTTrainer needs TRL; install it with: pip install 'seekr-peft[trl]'") from error

from .methods import ContinualMethod
from .trainer import ContinualTrainerMixin


class ContinualSFTTrainer(ContinualTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with ``method=``; pass the PeftModel and no ``peft_config``.

    SFTTrainer's own forward may use a fused head without logits or attention; replay runs a forward of its own, so
    nothing is asked of it. The adapter keeps its dtype over a quantised base, where SFTTrainer casts it to bfloat16:
    that breaks float16 training, and small updates of a later task would be rounded away.
    """

    def __init__(self, *args: Any, method: ContinualMethod, **kwargs: Any) -> None:
        adapter = list(method.stack.parameters().values()) if method.current_task is not None else []
        before = [(parameter, parameter.dtype) for parameter in adapter]
        super().__init__(*args, method=method, **kwargs)
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)
