"""What a recipe will need, before anything is loaded: peak memory of each phase, and the replay memory on disk.

The model is built from its configuration on the meta device, where tensors have a size but no memory, and each phase's
forward and backward runs there while the sizes are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention import attention_modules, head_shape
from ..attention.models import check_capture
from ..config import SeekrConfig
from ..memory import ReplaySample, choose_queries, estimate_bytes, replay_count
from ..methods import ContinualMethod, get_method
from ..recipe import Recipe, task_order
from ..recipe.base_config import read_config
from ..tasks import read_tasks
from ..tasks.tokenize import IGNORED_LABEL
from .lowered import LOWERED, lowered_forward
from .meta_model import QuantizedLinear, add_earlier, earlier_rank, meta_model, own_rank
from .phases import evaluation_peak, replay_peak, scoring_peak, training_peak

_BYTES_OF_4_BIT_BLOCK = 64
"""bitsandbytes keeps one scale for so many 4-bit weights."""


_OPTIMIZER_BYTES = {
    "ademamix_8bit": 3,
    "ademamix": 12,
    **{f"{name}_8bit": 1 for name in ("lion", "rmsprop", "adagrad")},
    **dict.fromkeys(("lion", "rmsprop", "adagrad"), 4),
    "8bit": 2,
    "adafactor": 0,
    "sgd": 0,
    "adam": 8,
}
"""State bytes of an optimizer for one trained number, by what its name holds; the first match counts."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run needs while it trains its last task.

    ``base`` the base model's weights; ``adapters`` those of the task's adapter and of the frozen sum of the earlier
    ones; ``optimizer`` its states; ``phases`` what each phase needs on top at its peak: "training", "replay",
    "scoring", "evaluation". ``replay_samples`` of one task and ``memory_on_disk`` over all tasks, at most.
    """

    base: int
    adapters: int
    optimizer: int
    phases: dict[str, int]
    n_tasks: int
    replay_samples: int
    bytes_per_sample: int
    memory_on_disk: int

    @property
    def resident(self) -> int:
        """What lies in memory throughout."""
        return self.base + self.adapters + self.optimizer

    @property
    def worst_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """Resident memory and the worst phase's."""
        return self.resident + self.phases[self.worst_phase]


def estimate_footprint(recipe: Recipe, n_train: int | None = None, answer_tokens: int | None = None) -> Footprint:
    """The footprint of ``recipe`` with every sample at ``tasks.max_length``.

    The compute dtype is the recipe's ``model.bnb_4bit_compute_dtype``, or what this machine would take.

    Args:
        n_train: Training samples of a task; None takes ``tasks.max_train``, or counts those of the largest task.
        answer_tokens: Answer tokens of a sample; None takes ``evaluation.max_new_tokens``.

    Raises:
        ConfigError: The base model's configuration cannot be read, or the model cannot be trained here; the adapter
            does not fit it; its memory cannot be predicted.
        CaptureError: The method distils attention, and the model's cannot be captured.
        AdapterError: The tasks' adapters cannot be added up: the recipe's adapter is not a plain LoRA.
        DataError: The samples had to be counted and a file is broken.
    """
    if n_train is None:
        n_train = recipe.tasks.max_train or _largest_task(recipe)
    config = read_config(recipe.model)
    # No prompt is longer than the model's own positions.
    length = min(recipe.tasks.max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)
    answers = min(answer_tokens or recipe.evaluation.max_new_tokens, length - 1)
    model = meta_model(recipe, config)
    kind = get_method(recipe.method_name)
    n_tasks = 1 if kind.joint else len(task_order(recipe))
    adapters, optimizer = _adapter_bytes(recipe, model, n_tasks)
    add_earlier(recipe, model, n_tasks)
    base = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" not in name)
    base += _scale_bytes(recipe, model) + sum(buffer.nbytes for buffer in model.buffers())
    method = recipe.method_config_as(SeekrConfig)
    attention = method.attention_distillation and "attention" in kind.teacher_signals
    if attention:
        # As the method will.
        check_capture(model)
    distils_logits = method.logits_distillation and "logits" in kind.teacher_signals
    logit_top_k = method.logit_top_k if distils_logits else 0
    sample = _sample(length, answers, method)
    # The Trainer's accelerate leaves the model's forward under autocast, so scoring is too; generate() goes past it.
    lowered = next((kind for name, kind in LOWERED.items() if recipe.training.get(name)), None)
    with lowered_forward(model, lowered):
        phases = {"training": training_peak(recipe, model, length)}
    n_samples = per_sample = 0
    if kind.replay_terms is not ContinualMethod.replay_terms:
        n_heads, at_hand = 0, n_train
        if kind.uses_replay:
            n_samples = replay_count(n_train, method.replay_ratio)
            at_hand = n_samples * (n_tasks - 1)
        if attention:
            n_heads = method.distilled_heads(len(attention_modules(model)), head_shape(model)[1])
        if kind.uses_replay:
            per_sample = _sample_bytes(model, method, sample, n_heads, logit_top_k)
        with lowered_forward(model, lowered):
            phases["replay"] = replay_peak(recipe, model, sample, answers, n_heads, logit_top_k, at_hand)
            if attention:
                phases["scoring"] = scoring_peak(recipe, model, sample, answers)
    # Beside an answer that is not known a prompt may take all the room.
    phases["evaluation"] = evaluation_peak(recipe, model, length - min(answer_tokens or 0, length - 1))
    return Footprint(
        base, adapters, optimizer, phases, n_tasks, n_samples, per_sample, n_tasks * n_samples * per_sample
    )


def _scale_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Scales and code books of the quantised layers."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = module.in_features * module.out_features
            if recipe.model.quantization == "int8":
                total += 4 * module.out_features
            elif recipe.model.bnb_4bit_use_double_quant:
                blocks = -(-size // _BYTES_OF_4_BIT_BLOCK)
                total += blocks + 4 * -(-blocks // 256) + 4 * 256 + 4 * 16 + 4
            else:
                total += 4 * -(-size // _BYTES_OF_4_BIT_BLOCK) + 4 * 16
    return total


def _adapter_bytes(recipe: Recipe, model: nn.Module, n_tasks: int) -> tuple[int, int]:
    """The current adapter and the earlier ones, and the optimizer's states."""
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    current = sum(parameter.nbytes for parameter in trained)
    earlier = current * earlier_rank(recipe, n_tasks) // own_rank(recipe)
    name = str(recipe.training.get("optim", "adamw"))
    state = next(size for part, size in {**_OPTIMIZER_BYTES, "": 8}.items() if part in name)
    return current + earlier, state * sum(parameter.numel() for parameter in trained)


def _sample(length: int, answers: int, method: SeekrConfig) -> ReplaySample:
    labels = torch.full((length,), IGNORED_LABEL)
    labels[-answers:] = 1
    queries = choose_queries(labels, method.query_budget, method.seed, method.query_choice)
    return ReplaySample(torch.ones(length, dtype=torch.long), labels, queries)


def _largest_task(recipe: Recipe) -> int:
    """Training samples of the task that has most."""
    tasks = read_tasks(recipe.tasks.format, recipe.tasks.path, recipe.tasks.order, max_test=1)
    return max(len(task.train) for task in tasks)


def _sample_bytes(model: Any, method: SeekrConfig, sample: ReplaySample, n_heads: int, logit_top_k: int) -> int:
    """One sample's share of a large file."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    top_k = method.row_top_k, logit_top_k
    one, two = (estimate_bytes([sample] * n, n_heads, *top_k, vocabulary, method.storage_dtype) for n in (1, 2))
    return two - one
