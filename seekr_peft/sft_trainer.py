"""``ContinualSFTTrainer``: TRL's SFTTrainer whose steps also replay. Needs the ``trl`` extra."""

from __future__ import annotations

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("ContinualSFTTrainer needs TRL; install it with: pip install 'seekr-peft[trl]'") from error

from .trainer import ContinualTrainerMixin


class ContinualSFTTrainer(ContinualTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with ``method=``; pass the PeftModel and no ``peft_config``.

    SFTTrainer's own forward may use a fused head without logits or attention; replay runs a forward of its own, so
    nothing is asked of it.
    """
