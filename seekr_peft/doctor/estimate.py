"""What a recipe will need, before anything is loaded: peak memory of each phase, and the replay memory on disk.

The model is built from its configuration on the meta device, where tensors have a size but no memory, and each phase's
forward and backward runs there while the sizes are counted.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from ..attention import AttentionCall, AttentionTap, TeacherRows, attention_modules, head_shape
from ..attention.models import EAGER, base_transformer, check_capture, has_attention, looks_functions_up
from ..attention.row_math import BROADEST, HeadPairs
from ..config import SeekrConfig, budget_count
from ..errors import ConfigError, SeekrError
from ..heads import HeadSelection
from ..memory import ReplaySample, choose_queries, estimate_bytes, replay_count
from ..methods import ContinualMethod, get_method
from ..model.adapter_stack import check_summable, resolved_rank_limit
from ..model.answers import differentiable_input, evaluation_mode
from ..model.kind import causal_class
from ..model.peak_memory import PeakMemory
from ..recipe.base_model import CHECKPOINTING, add_adapter, attention_implementation, compute_dtype, read_config
from ..recipe.schema import DEMO, Recipe, task_order
from ..tasks import read_tasks

_ATTENTION = "seekr_footprint"
_CACHES = ("past_key_values", "cache_params", "state")
"""What a model's output calls that which it keeps for the next token."""

_BYTES_OF_4_BIT_BLOCK = 64
"""bitsandbytes keeps one scale for so many 4-bit weights."""

_EARLIER = "earlier"
"""The frozen sum of the earlier tasks' adapters, which acts beside the task's own."""

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
        ConfigError: The base model's configuration cannot be read, or is of none that can be trained; its adapter does
            not fit; its memory cannot be predicted.
        CaptureError: The method distils attention, and the model's cannot be captured.
        AdapterError: The adapter is none that can be added up over the tasks.
        DataError: The samples had to be counted and a file is broken.
    """
    if n_train is None:
        # The demo's own default.
        n_train = recipe.tasks.max_train or (600 if recipe.tasks.format == DEMO else None)
    if n_train is None:
        tasks = read_tasks(recipe.tasks.format, str(recipe.tasks.path), recipe.tasks.order, max_test=1)
        n_train = max(len(task.train) for task in tasks)
    config = read_config(recipe.model)
    # No prompt is longer than the model's own positions.
    length = min(recipe.tasks.max_length, getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9)
    answers = min(answer_tokens or recipe.evaluation.max_new_tokens, length - 1)
    model = _meta_model(recipe, config)
    kind = get_method(recipe.method_name)
    n_tasks = 1 if kind.joint else len(task_order(recipe))
    adapters, optimizer = _adapter_bytes(recipe, model, n_tasks)
    _add_earlier(recipe, model, n_tasks)
    base = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" not in name)
    base += _scale_bytes(recipe, model) + sum(buffer.nbytes for buffer in model.buffers())
    method = recipe.method_config()
    attention = method.attention_distillation and "attention" in kind.teacher_signals
    if attention:
        # As the method will.
        check_capture(model)
    distils_logits = method.logits_distillation and "logits" in kind.teacher_signals
    logit_top_k = method.logit_top_k if distils_logits else 0
    sample = _sample(length, answers, method)
    # The Trainer's accelerate leaves the model's forward under autocast, so scoring is too; generate() goes past it.
    lowered = next((kind for name, kind in _LOWERED.items() if recipe.training.get(name)), None)
    with _autocast(model, lowered):
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
        with _autocast(model, lowered):
            phases["replay"] = _replay(recipe, model, sample, answers, n_heads, logit_top_k, at_hand)
            if attention:
                phases["scoring"] = _scoring(recipe, model, sample, answers)
    # Beside an answer that is not known a prompt may take all the room.
    phases["evaluation"] = _evaluation(recipe, model, length - min(answer_tokens or 0, length - 1))
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
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--memory must be a number of GB above 0, got {memory}.")
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


def _meta_model(recipe: Recipe, config: Any) -> Any:
    """The recipe's quantised base with the LoRA adapter, of tensors without memory."""
    dtype = compute_dtype(recipe.model)
    kernel = _kernel(recipe, config)
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
        except Exception as error:
            # What a configuration's class does not check itself fails in many ways.
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"model.name_or_path: {recipe.model.name_or_path} cannot be made: {detail}") from error
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
        model = add_adapter(base, recipe)
        check_summable(model)
    _mimic_lora(recipe, model)
    return model


def _kernel(recipe: Recipe, config: Any) -> str:
    """The attention to build the model with: the stand-in for a fused kernel, where the model's file looks it up by
    name. What a family computes itself is made of plain operators, which are counted as they are."""
    wanted = attention_implementation(recipe.model.attn_implementation, config)
    model_class, _ = causal_class(config)
    if wanted == EAGER or model_class is None or looks_functions_up(model_class):
        return EAGER if wanted == EAGER else _ATTENTION
    # Falcon calls torch's own; GPT-Neo has a class of its own for flash attention, which needs a GPU.
    return wanted if wanted == "sdpa" else EAGER


def _add_earlier(recipe: Recipe, model: Any, n_tasks: int) -> None:
    """The adapter that AdapterStack keeps beside the last task's."""
    rank = _earlier_rank(recipe, n_tasks)
    if not rank:
        return
    own = model.active_adapter
    config = replace(
        model.peft_config[own], r=rank, lora_alpha=rank, lora_dropout=0.0, rank_pattern={}, alpha_pattern={}
    )
    with torch.device("meta"):
        model.add_adapter(_EARLIER, config)
    _mimic_lora(recipe, model)
    model.base_model.set_adapter([_EARLIER, own])
    for name, parameter in model.named_parameters():
        if f".{_EARLIER}." in name:
            parameter.requires_grad_(False)


def _earlier_rank(recipe: Recipe, n_tasks: int) -> int:
    if recipe.adapter.mode != "stack":
        return 0
    own = _own_rank(recipe)
    ranks = own * (n_tasks - 1)
    return min(ranks, resolved_rank_limit(recipe.adapter.rank_limit, own) or ranks)


def _own_rank(recipe: Recipe) -> int:
    lora = recipe.adapter.lora()
    return int(max([lora["r"], *(lora.get("rank_pattern") or {}).values()]))


def _mimic_lora(recipe: Recipe, model: nn.Module) -> None:
    if recipe.model.quantization == "nf4":
        for module in model.modules():
            if type(module) is LoraLinear and isinstance(module.base_layer, _QuantizedLinear):
                module.__class__ = _LoraOf4Bit


class _LoraOf4Bit(LoraLinear):
    """As PEFT's layer over a 4-bit one: it copies the product, and one adapter's output is there until the next's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x)
        result = result.clone()
        # PEFT asks for a GPU's autocast only, so under a CPU's it converts.
        converts = not torch.cuda.is_available()
        for name in self.active_adapters:
            if name in self.lora_A:
                x = x.to(self.lora_A[name].weight.dtype) if converts else x
                output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
                output = output.to(result.dtype) if converts else output
                result = result + output
        return result


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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
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


class _GroupedProducts(TorchFunctionMode):
    """Products of tokens with their experts' weights, which torch has on the meta device for bfloat16 alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return _GroupedProduct.apply(*args[:2])
        return func(*args, **(kwargs or {}))


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        # Each is kept for the other's gradient.
        needs_input, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.shapes = input.shape, weight.shape
        return input.new_empty(*input.shape[:-1], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return tuple(
            gradient.new_empty(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


_LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _LoweredLinear(nn.Linear):
    """A linear layer under autocast, which torch does not have for the meta device."""

    lowered: torch.dtype
    casts: list[Tensor]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(self.lowered)
        if self.weight.requires_grad:
            # Autocast keeps a trained weight's cast until its block ends.
            self.casts.append(weight)
        return F.linear(input.to(self.lowered), weight, None if self.bias is None else self.bias.to(self.lowered))


class _LoweredProducts(TorchFunctionMode):
    """The products of an eager attention module under autocast, while its forward runs."""

    functions = frozenset(
        {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
    )

    def __init__(self, lowered: torch.dtype) -> None:
        super().__init__()
        self.lowered = lowered

    def begin(self, module: nn.Module, args: Any) -> None:
        self.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions:
            args = [
                value.to(self.lowered) if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in args
            ]
        return func(*args, **(kwargs or {}))


@contextmanager
def _autocast(model: nn.Module, lowered: torch.dtype | None) -> Iterator[None]:
    """The model's forward under autocast and its output in float32, as accelerate wraps it; the backward outside."""
    if lowered is None:
        yield
        return
    casts: list[Tensor] = []
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    # Only eager attention's products are not in a linear layer, nor in the stand-in.
    attention = attention_modules(model).values() if has_attention(model) else []

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        casts.clear()
        output.logits = output.logits.float()

    handles = [model.register_forward_hook(finish)]
    for module in linear:
        module.__class__ = _LoweredLinear
        module.lowered, module.casts = lowered, casts
    for module in attention:
        module.lowered = lowered
        if model.config.get_text_config()._attn_implementation == EAGER:
            products = _LoweredProducts(lowered)
            handles.append(module.register_forward_pre_hook(products.begin))
            handles.append(module.register_forward_hook(products.end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in linear:
            del module.lowered, module.casts
            module.__class__ = nn.Linear
        for module in attention:
            del module.lowered


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
    earlier = current * _earlier_rank(recipe, n_tasks) // _own_rank(recipe)
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
    with _counted(model) as memory:
        step()
    model.zero_grad()
    return memory.peak


@contextmanager
def _counted(model: nn.Module) -> Iterator[PeakMemory]:
    """The sizes of what is allocated inside, by the model's own code above all.

    Raises:
        ConfigError: That code does what no tensor without values can.
    """
    try:
        with PeakMemory() as memory, _GroupedProducts():
            yield memory
    except (SeekrError, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model.name_or_path: the memory that {type(base_transformer(model)).__name__} needs cannot be predicted, "
            f"since its forward needs the values of its tensors and not only their sizes ({detail}); measure it by a "
            f"run with training.max_steps: 1."
        ) from error


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "attention_mask": tokens}


def _training(recipe: Recipe, model: Any, length: int) -> int:
    """Forward and backward on a batch of the new task."""
    batch = _tokens(int(recipe.training.get("per_device_train_batch_size", 8)), length)
    smoothing = recipe.training.get("label_smoothing_factor")
    model.train()

    def step() -> None:
        if smoothing:
            # As the Trainer does.
            output = model(**batch, use_cache=False)
            LabelSmoother(smoothing)(output, batch["input_ids"], shift_labels=True).backward()
        else:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

    return _peak(model, step)


def _replay(
    recipe: Recipe, model: Any, sample: ReplaySample, answers: int, n_heads: int, logit_top_k: int, stored: int
) -> int:
    """Forward and backward on a replay batch, while the new task's gradient lies there."""
    method, length = recipe.method_config(), len(sample.input_ids)
    batch_size = min(method.replay_batch_size, stored)
    if batch_size == 0:
        return 0
    batch = _tokens(batch_size, length)
    heads = _spread(method, model, n_heads)
    model.train()

    def step() -> None:
        teacher = _teacher(method, heads, batch_size, sample)

        def distance(layer: int, call: AttentionCall) -> Tensor:
            return call.pair_kl(*teacher[layer])

        with AttentionTap(model, heads, sample.queries, observe=distance) as tap:
            loss = _answer_loss(model, batch, answers)
            for value in tap.values.values():
                loss = loss + value
            loss.backward()

    # Entries in a batch are padded to the broadest row: a float32 probability each, and an index.
    entries = min(BROADEST * logit_top_k, int(model.config.get_text_config().vocab_size))
    return _peak(model, step) + batch_size * answers * 12 * entries


def _spread(method: SeekrConfig, model: nn.Module, n_heads: int) -> HeadSelection:
    """``n_heads`` over as many layers as a selection may take."""
    if not n_heads:
        return HeadSelection({})
    layers = list(attention_modules(model))
    if method.head_choice != "all":
        layers = layers[-budget_count(method.layer_budget, len(layers)) :]
    share, left = divmod(n_heads, len(layers))
    counts = {layer: share + (i < left) for i, layer in enumerate(layers)}
    return HeadSelection({layer: range(count) for layer, count in counts.items() if count})


def _teacher(
    method: SeekrConfig, heads: HeadSelection, batch_size: int, sample: ReplaySample
) -> dict[int, tuple[HeadPairs, TeacherRows, Tensor]]:
    """The stored rows of a replay batch, padded to the broadest, and their weights. Which heads a sample has does not
    matter, only how many."""
    k = min(BROADEST * method.row_top_k, len(sample.input_ids))
    found = {}
    for layer, chosen in heads.items():
        pairs = HeadPairs.of_all(torch.zeros(len(chosen), dtype=torch.long, device="meta"), batch_size)
        shape = 1, batch_size * len(chosen), len(sample.queries)
        indices = torch.zeros(*shape, k, dtype=torch.int32, device="meta")
        rows, remaining, weights = (torch.zeros(*size, device="meta") for size in ((*shape, k), shape, shape))
        found[layer] = pairs, TeacherRows(indices, rows, remaining), weights
    return found


def _scoring(recipe: Recipe, model: Any, sample: ReplaySample, answers: int) -> int:
    """One sample, as ``score_heads`` does it: every head's rows before the task, those after it and the backward."""
    heads = HeadSelection({layer: range(head_shape(model)[1]) for layer in attention_modules(model)})
    batch, every_query = _tokens(1, len(sample.input_ids)), recipe.method_config().sensitivity_queries == "all"
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def score() -> None:
        queries = sample.queries[None]
        with torch.no_grad(), _only_earlier(model), AttentionTap(model, heads, queries) as tap:
            _answer_loss(model, batch, answers, distils=False)
            before = {layer: found[0] for layer, found in tap.values.items()}
        del tap

        def change(layer: int, call: AttentionCall) -> Tensor:
            if layer not in before:
                return torch.zeros(())
            with torch.no_grad():
                return (call.rows()[0] - before.pop(layer)).square().sum(dim=(-1, -2))

        squares: Literal["every", "selected"] = "every" if every_query else "selected"
        with AttentionTap(model, heads, queries, observe=change, squares=squares) as tap:
            tap.gradient_squares(_answer_loss(model, batch, answers, distils=False))

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluation_mode(model, checkpointing=True), differentiable_input(model):
            return _peak(model, score)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def _only_earlier(model: Any) -> Iterator[None]:
    """The model as it was before the task."""
    shown = list(model.base_model.active_adapters)
    if _EARLIER not in shown:
        # Its own adapter, with the values from before the task.
        yield
        return
    model.base_model.set_adapter([_EARLIER], inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(shown, inference_mode=True)


def _evaluation(recipe: Recipe, model: Any, length: int) -> int:
    """The prompts of one batch, or their answers' last token: then the cache is full."""
    model.eval()
    batch_size, new = recipe.evaluation.batch_size, recipe.evaluation.max_new_tokens
    # A task that has ended is part of the frozen sum.
    with torch.no_grad(), _only_earlier(model), _counted(model) as memory:
        output = model(**_tokens(batch_size, length), use_cache=True, logits_to_keep=1)
    cache = next((output[name] for name in _CACHES if output.get(name) is not None), None)
    if cache is None:
        # Such a model (OpenAI's GPT) reads everything again for each token.
        with torch.no_grad(), _only_earlier(model), _counted(model) as memory:
            model(**_tokens(batch_size, length + new))
        return memory.peak
    # Layers of a state-space model keep a state that does not grow.
    parts = [part.nbytes for layer in getattr(cache, "layers", []) for part in _keys_and_values(layer)]
    # A token is joined to a layer's keys, and then to its values, by a copy of them.
    full_and_copy = (sum(parts) + max(parts, default=0)) * (length + new) // length
    return max(memory.peak, full_and_copy)


def _keys_and_values(layer: Any) -> list[Tensor]:
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [part for part in found if isinstance(part, Tensor)]


def _answer_loss(model: Any, batch: dict[str, Tensor], answers: int, distils: bool = True) -> Tensor:
    """Cross-entropy at the answer positions only, as every replay step computes it."""
    logits = model(**batch, use_cache=False, logits_to_keep=answers).logits.flatten(0, 1)
    targets = torch.zeros(logits.shape[0], dtype=torch.long, device="meta")
    loss = F.cross_entropy(logits.float(), targets)
    # The labels' and the teacher's term each need the distribution.
    return loss + logits.float().log_softmax(dim=-1).mean() if distils else loss
