"""``ContinualSFTTrainer``: TRL's SFTTrainer whose steps also replay. Needs the ``trl`` extra.

The one file that reaches into TRL (verified with 1.16): ``_prepare_dataset`` turns a data set of texts, chats or tokens
into ``input_ids`` and ``labels`` and then packs it; only there both sides of the packing can be had. A test notices
when it changes.
"""

from __future__ import annotations

import copy
from typing import Any

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("ContinualSFTTrainer needs TRL; install it with: pip install 'seekr-peft[trl]'") from error

from ..methods import ContinualMethod
from ..tasks.inputs import check_rows
from .trainer import ContinualTrainerMixin


class ContinualSFTTrainer(ContinualTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with ``method=``; pass the PeftModel and no ``peft_config``.

    The replay samples are drawn from the training set as the trainer prepared it, with its own chat template, masks and
    truncation, one sample a row although it may train on packed ones: leave ``replay_from`` out.

    SFTTrainer's own forward may use a fused head without logits or attention; replay runs a forward of its own, so
    nothing is asked of it. The adapter keeps its dtype over a quantised base, where SFTTrainer casts it to bfloat16:
    that breaks float16 training, and small updates of a later task would be rounded away.
    """

    def __init__(self, *args: Any, method: ContinualMethod, **kwargs: Any) -> None:
        check_rows(kwargs.get("train_dataset"), "train_dataset")
        adapter = list(method.stack.parameters().values()) if method.current_task is not None else []
        before = [(parameter, parameter.data) for parameter in adapter]
        self._unpacked: Any = None
        super().__init__(*args, method=method, **kwargs)
        self._unpacked = None
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                # The values too: in the other dtype they were rounded.
                parameter.data = data.to(parameter.device)

    def samples_to_draw_from(self) -> Any:
        return super().samples_to_draw_from() if self._unpacked is None else self._unpacked

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As in SFTTrainer; of a training set that will be packed, what it was before is kept to draw from."""

        def prepared(part: Any, settings: Any, packed: bool, to_text: Any = None) -> Any:
            return super(ContinualSFTTrainer, self)._prepare_dataset(
                part, processing_class, settings, packed, to_text, dataset_name
            )

        if not packing or dataset_name != "train":
            return prepared(dataset, args, packing, formatting_func)
        whole = prepared(dataset, _changed(args, max_length=None, shuffle_dataset=False), False, formatting_func)
        self._unpacked = prepared(whole, _changed(args, shuffle_dataset=False), False)
        return prepared(whole, args, packing)


def _changed(args: Any, **changes: Any) -> Any:
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
