"""The recipe's model on the meta device, where tensors have a size but no memory: quantised, with its adapters.

What a library computes in a kernel of its own (bitsandbytes' products, fused attention, products with experts) has a
stand-in here that needs what the kernel needs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from ..attention.models import EAGER, looks_functions_up
from ..errors import ConfigError
from ..model.adapter_checks import check_summable
from ..model.kind import causal_class
from ..model.low_rank_sum import resolved_rank_limit
from ..recipe import Recipe
from ..recipe.base_config import attention_implementation
from ..recipe.base_model import CHECKPOINTING, add_adapter
from ..recipe.quantization import compute_dtype

_ATTENTION = "seekr_footprint"


EARLIER = "earlier"
"""The frozen sum of the earlier tasks' adapters, which acts beside the task's own."""


def meta_model(recipe: Recipe, config: Any) -> Any:
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


def add_earlier(recipe: Recipe, model: Any, n_tasks: int) -> None:
    """The adapter that AdapterStack keeps beside the last task's."""
    rank = earlier_rank(recipe, n_tasks)
    if not rank:
        return
    own = model.active_adapter
    config = replace(
        model.peft_config[own], r=rank, lora_alpha=rank, lora_dropout=0.0, rank_pattern={}, alpha_pattern={}
    )
    with torch.device("meta"):
        model.add_adapter(EARLIER, config)
    _mimic_lora(recipe, model)
    model.base_model.set_adapter([EARLIER, own])
    for name, parameter in model.named_parameters():
        if f".{EARLIER}." in name:
            parameter.requires_grad_(False)


def earlier_rank(recipe: Recipe, n_tasks: int) -> int:
    if recipe.adapter.mode != "stack":
        return 0
    own = own_rank(recipe)
    ranks = own * (n_tasks - 1)
    return min(ranks, resolved_rank_limit(recipe.adapter.rank_limit, own) or ranks)


def own_rank(recipe: Recipe) -> int:
    lora = recipe.adapter.lora()
    return int(max([lora["r"], *(lora.get("rank_pattern") or {}).values()]))


def _mimic_lora(recipe: Recipe, model: nn.Module) -> None:
    if recipe.model.quantization == "nf4":
        for module in model.modules():
            if type(module) is LoraLinear and isinstance(module.base_layer, QuantizedLinear):
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
            module.__class__ = QuantizedLinear
            module.compute_dtype = dtype
            n_bytes = module.in_features * module.out_features // (2 if recipe.model.quantization == "nf4" else 1)
            module.weight = nn.Parameter(torch.empty(n_bytes, dtype=torch.uint8), requires_grad=False)


class QuantizedLinear(nn.Linear):
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


class GroupedProducts(TorchFunctionMode):
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
