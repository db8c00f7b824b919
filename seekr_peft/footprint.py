"""What a recipe will need, before anything is loaded: peak memory of each phase, and the replay memory on disk.

The model is built from its configuration on the meta device, where tensors have a size but no memory, and each phase's
forward and backward runs there while the sizes are counted. May import ``recipe``, ``memory``, ``peak_memory``,
``attention``, ``config`` and ``errors``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from .adapters import resolved_rank_limit
from .attention.call import KINDS_OF_MASK
from .attention.rows import BROADEST, CHUNK_BYTES
from .attention.support import attention_modules, head_shape
from .config import SeekrConfig
from .errors import ConfigError
from .forward import evaluation_mode
from .memory import ReplaySample, choose_queries, estimate_bytes, replay_count
from .methods import ContinualMethod, get_method
from .modeling import CHECKPOINTING, compute_dtype, resolve_name
from .peak_memory import PeakMemory
from .recipe import DEMO, Recipe, task_order
from .tasks import read_tasks

_ATTENTION = "seekr_footprint"
_BYTES_OF_4_BIT_BLOCK = 64
"""bitsandbytes keeps one scale for so many 4-bit weights."""

_OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0, "sgd": 0, "adam": 8}
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
        ConfigError: The base model's configuration cannot be read.
        DataError: The samples had to be counted and a file is broken.
    """
    if n_train is None:
        # The demo's own default.
        n_train = recipe.tasks.max_train or (600 if recipe.tasks.format == DEMO else None)
    if n_train is None:
        tasks = read_tasks(recipe.tasks.format, str(recipe.tasks.path), recipe.tasks.order, max_test=1)
        n_train = max(len(task.train) for task in tasks)
    config = _model_config(recipe)
    # No prompt is longer than the model's own positions.
    length = min(recipe.tasks.max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)
    answers = min(answer_tokens or recipe.evaluation.max_new_tokens, length - 1)
    model = _meta_model(recipe, config)
    kind = get_method(recipe.method_name)
    n_tasks = 1 if kind.joint else len(task_order(recipe))
    adapters, optimizer = _adapter_bytes(recipe, model, n_tasks)
    base = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" not in name)
    base += _scale_bytes(recipe, model) + sum(buffer.nbytes for buffer in model.buffers())
    method = recipe.method_config()
    attention = method.attention_distillation and "attention" in kind.teacher_signals
    distils_logits = method.logits_distillation and "logits" in kind.teacher_signals
    logit_top_k = method.logit_top_k if distils_logits else 0
    sample = _sample(length, answers, method)
    phases = {"training": _training(recipe, model, length)}
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
        phases["replay"] = _replay(recipe, model, length, answers, n_heads, logit_top_k, at_hand)
        if attention:
            phases["scoring"] = _scoring(recipe, model, sample, length, answers)
    phases["evaluation"] = _evaluation(recipe, model, length)
    return Footprint(
        base, adapters, optimizer, phases, n_tasks, n_samples, per_sample, n_tasks * n_samples * per_sample
    )


def first_knob(footprint: Footprint, recipe: Recipe) -> str:
    """The setting to change first when ``footprint`` does not fit: it acts on the largest part."""
    phase = footprint.worst_phase
    if footprint.resident > footprint.phases[phase]:
        if recipe.model.quantization == "none":
            return "model.quantization: nf4 (the weights are the largest part)"
        if footprint.optimizer + footprint.adapters > footprint.base:
            return "adapter.r (the adapters and their optimizer are the largest part)"
    if phase == "training":
        if not any(recipe.training.get(name) for name in CHECKPOINTING):
            return "training.gradient_checkpointing: true"
        if recipe.training.get("per_device_train_batch_size", 8) > 1:
            return "training.per_device_train_batch_size, with training.gradient_accumulation_steps in its place"
        return "tasks.max_length"
    return {
        "replay": "method.replay_batch_size",
        "scoring": "method.query_budget",
        "evaluation": "evaluation.batch_size",
    }[phase]


def render_footprint(recipe: Recipe, console: Console, memory: float | None = None) -> bool:
    """Print the footprint of ``recipe`` and whether it fits into ``memory`` GB (None: this machine's); True if so."""
    footprint = estimate_footprint(recipe)
    table = Table(title=f"{recipe.model.name_or_path}, {recipe.method_name}: GB at most", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    parts = {
        "base weights": footprint.base,
        f"adapters, {footprint.n_tasks} tasks": footprint.adapters,
        "optimizer": footprint.optimizer,
        **{f"+ {phase}": size for phase, size in footprint.phases.items()},
    }
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row(f"peak, in {footprint.worst_phase}", f"{footprint.peak / 1e9:.3f}")
    console.print(table)
    if footprint.replay_samples:
        console.print(
            f"replay memory on disk, at most: {footprint.memory_on_disk / 1e6:.1f} MB ({footprint.n_tasks} tasks of "
            f"{footprint.replay_samples} samples of {footprint.bytes_per_sample / 1e3:.1f} kB)",
            soft_wrap=True,
        )
    available = memory * 1e9 if memory is not None else _memory_here()
    fits = footprint.peak <= available
    text = "fits" if fits else f"does not fit; the first knob to turn: {first_knob(footprint, recipe)}"
    console.print(f"{available / 1e9:.1f} GB at hand: {text}", soft_wrap=True)
    return fits


def _memory_here() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The model on the meta device -----------------------------------------------------------------------------------


def _model_config(recipe: Recipe) -> Any:
    name = resolve_name(recipe.model)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=recipe.model.trust_remote_code)
    except (OSError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"model.name_or_path: the configuration of {name} cannot be read: {detail}") from error


def _meta_model(recipe: Recipe, config: Any) -> Any:
    """The recipe's quantised base with the LoRA adapter, of tensors without memory."""
    dtype = compute_dtype(recipe.model)
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
        base.config.use_cache = False
        base.requires_grad_(False)
        if recipe.model.quantization != "none":
            _quantize(base, recipe, dtype)
            # As prepare_model_for_kbit_training does.
            for parameter in base.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        if any(recipe.training.get(name) for name in CHECKPOINTING):
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        model = get_peft_model(base, LoraConfig(**recipe.adapter.lora()))
    for name, lowered in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if recipe.training.get(name):
            _autocast(model, lowered)
    return model


def _quantize(base: nn.Module, recipe: Recipe, dtype: torch.dtype) -> None:
    head = base.get_output_embeddings()
    for module in base.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.__class__ = _QuantizedLinear
            module.compute_dtype = dtype
            n_bytes = module.in_features * module.out_features // (2 if recipe.model.quantization == "nf4" else 1)
            module.weight = nn.Parameter(torch.empty(n_bytes, dtype=torch.uint8), requires_grad=False)


class _QuantizedLinear(nn.Linear):
    """Needs what bitsandbytes' layer needs: the packed weight, and the whole one for as long as it is multiplied."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _QuantizedProduct.apply(
            input.to(self.compute_dtype), (self.out_features, self.in_features), self.bias
        )
        return output.to(input.dtype)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(input, input.new_empty(shape), None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a fused kernel keeps: q, k, v, the output and one number a row."""
    lowered = getattr(module, "lowered", query.dtype)
    query, key, value = query.to(lowered), key.to(lowered), value.to(lowered)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # transformers' sdpa repeats the shared heads.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _LoweredLinear(nn.Linear):
    """A linear layer under autocast, which torch does not have for the meta device."""

    lowered: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(
            input.to(self.lowered),
            self.weight.to(self.lowered),
            None if self.bias is None else self.bias.to(self.lowered),
        )


def _autocast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _LoweredLinear
            module.lowered = dtype
    for module in attention_modules(model).values():
        module.lowered = dtype


# Bytes ----------------------------------------------------------------------------------------------------------


def _scale_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Scales and code books of the quantised layers."""
    total = 0
    for module in model.modules():
        if isinstance(module, _QuantizedLinear):
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
    earlier = 0
    if recipe.adapter.mode == "stack":
        lora = recipe.adapter.lora()
        own = max([lora["r"], *(lora.get("rank_pattern") or {}).values()])
        ranks = own * (n_tasks - 1)
        ranks = min(ranks, resolved_rank_limit(recipe.adapter.rank_limit, own) or ranks)
        earlier = current * ranks // own
    name = str(recipe.training.get("optim", "adamw"))
    state = next(size for part, size in {**_OPTIMIZER_BYTES, "": 8}.items() if part in name)
    return current + earlier, state * sum(parameter.numel() for parameter in trained)


def _sample(length: int, answers: int, method: SeekrConfig) -> ReplaySample:
    labels = torch.full((length,), -100)
    labels[-answers:] = 1
    queries = choose_queries(labels, method.query_budget, method.seed, method.query_choice)
    return ReplaySample(torch.ones(length, dtype=torch.long), labels, queries)


def _sample_bytes(model: Any, method: SeekrConfig, sample: ReplaySample, n_heads: int, logit_top_k: int) -> int:
    """One sample's share of a large file."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    top_k = method.row_top_k, logit_top_k
    one, two = (estimate_bytes([sample] * n, n_heads, *top_k, vocabulary, method.storage_dtype) for n in (1, 2))
    return two - one


# Phases ---------------------------------------------------------------------------------------------------------


def _peak(model: nn.Module, step: Callable[[], object]) -> int:
    model.zero_grad()
    with PeakMemory() as memory:
        step()
    model.zero_grad()
    return memory.peak


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "attention_mask": tokens}


def _training(recipe: Recipe, model: Any, length: int) -> int:
    """Forward and backward on a batch of the new task."""
    batch = _tokens(int(recipe.training.get("per_device_train_batch_size", 8)), length)
    model.train()
    return _peak(model, lambda: model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward())


def _replay(recipe: Recipe, model: Any, length: int, answers: int, n_heads: int, logit_top_k: int, stored: int) -> int:
    """Forward and backward on a replay batch, while the new task's gradient lies there."""
    method = recipe.method_config()
    batch_size = min(method.replay_batch_size, stored)
    if batch_size == 0:
        return 0
    batch = _tokens(batch_size, length)
    model.train()
    step = _peak(model, lambda: _answer_loss(model, batch, answers).backward())
    # Entries in a batch are padded to the broadest row: a float32 probability each, and an index.
    step += batch_size * answers * 12 * min(BROADEST * logit_top_k, int(model.config.get_text_config().vocab_size))
    if not n_heads:
        return step
    # Per selected head: the gradients of its queries and keys, kept for the backward (float16's in float32), and the
    # teacher's rows with a remaining mass and a weight each.
    queries = min(method.query_budget or length, length)
    head_dim = _head_dim(model)
    dtype = compute_dtype(recipe.model)
    size = 4 if dtype == torch.float16 else dtype.itemsize
    entries = 8 * min(BROADEST * method.row_top_k, length)
    kept = n_heads * ((queries + length) * head_dim * size + queries * (entries + 8))
    # One layer's logits and probabilities; the mask of all layers as bool and as what is added to the logits.
    n_layers = len(attention_modules(model))
    rows = 2 * min(CHUNK_BYTES, -(-n_heads // n_layers) * queries * length * 4 * batch_size)
    kinds = len(set(getattr(model.config.get_text_config(), "layer_types", None) or [None]))
    mask = min(kinds, KINDS_OF_MASK) * batch_size * queries * length * 5
    return step + batch_size * kept + mask + rows


def _scoring(recipe: Recipe, model: Any, sample: ReplaySample, length: int, answers: int) -> int:
    """One sample: the rows of every head before the task, and the backward to each layer's attention."""
    n_layers, n_heads = len(attention_modules(model)), head_shape(model)[1]
    embeddings = model.get_input_embeddings()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with evaluation_mode(model, checkpointing=True), PeakMemory() as memory:
            _answer_loss(model, _tokens(1, length), answers).backward()
    finally:
        handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
    # The rows from before the task are all there when the second forward begins and are dropped layer by layer.
    rows = n_heads * len(sample.queries) * length * 4
    # The gradients of all layers' outputs at the end, and each layer's q, k, v and output, which the sensitivity comes
    # from: checkpointing does not drop them.
    checkpointed = any(recipe.training.get(name) for name in CHECKPOINTING)
    size = compute_dtype(recipe.model).itemsize
    kept = (5 if checkpointed else 1) * n_layers * n_heads * _head_dim(model) * length * size
    return max(memory.peak // 2 + (n_layers + 2) * rows, memory.peak + kept + 3 * rows)


def _evaluation(recipe: Recipe, model: Any, length: int) -> int:
    """The prompts of one batch, and room for the answers in the cache."""
    model.eval()
    batch = _tokens(recipe.evaluation.batch_size, length)
    with torch.no_grad(), PeakMemory() as memory:
        output = model(**batch, use_cache=True, logits_to_keep=1)
    del output
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or head_shape(model)[1]
    per_token = 2 * len(attention_modules(model)) * kv_heads * _head_dim(model) * compute_dtype(recipe.model).itemsize
    return memory.peak + recipe.evaluation.batch_size * recipe.evaluation.max_new_tokens * per_token


def _answer_loss(model: Any, batch: dict[str, Tensor], answers: int) -> Tensor:
    """Cross-entropy at the answer positions only, as every replay step computes it."""
    logits = model(**batch, use_cache=False, logits_to_keep=answers).logits.flatten(0, 1)
    targets = torch.zeros(logits.shape[0], dtype=torch.long, device="meta")
    # The labels' and the teacher's term each need the distribution.
    return F.cross_entropy(logits.float(), targets) + logits.float().log_softmax(dim=-1).mean()


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
