"""Tiny random models from a configuration: no download, every size distinct, so that a swapped axis cannot pass.
Beside them a padded batch to run them on and a measure of the largest tensor that a computation makes.

A builder called twice gives the same weights, so ``tiny_llama("eager")`` is the eager twin of ``tiny_llama()``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

VOCABULARY = 61
N_LAYERS = 3
N_HEADS = 6
N_KV_HEADS = 2
HEAD_DIM = 10
SLIDING_WINDOW = 7

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    # transformers' 0.02 would give almost uniform attention, where many mistakes cannot be seen.
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def tiny_llama(attention: str = "sdpa", **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig(**{**_SIZES, **changes}), attention)


def tiny_qwen3(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """With norms on q and k."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, Qwen3Config(**{**_SIZES, **changes}), attention)


def tiny_mistral(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Every layer sees ``SLIDING_WINDOW`` positions."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**_SIZES, "sliding_window": SLIDING_WINDOW, **changes})
    return _build(MistralForCausalLM, config, attention)


def tiny_mixtral(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Two of four experts for each token; widths of which torch's product of experts takes no others."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**_SIZES, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}
    return _build(MixtralForCausalLM, MixtralConfig(**sizes), attention)


def tiny_gpt2(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """One key head per query head, learnt positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 60,
        "n_layer": N_LAYERS,
        "n_head": N_HEADS,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**{**sizes, **changes}), attention)


def tiny_gpt_neo(attention: str = "eager", **changes: Any) -> nn.Module:
    """Its second layer sees ``SLIDING_WINDOW`` positions; eager only, and its layers carry a ``layer_id``."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 60,
        "num_layers": N_LAYERS,
        "num_heads": N_HEADS,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": SLIDING_WINDOW,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build(GPTNeoForCausalLM, GPTNeoConfig(**{**sizes, **changes}), attention)


def tiny_openai_gpt(attention: str = "eager", **changes: Any) -> nn.Module:
    """Layers without an index, which return their weights on request only."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 60, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 128}
    options = {"initializer_range": 0.2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return _build(OpenAIGPTLMHeadModel, OpenAIGPTConfig(**{**sizes, **options, **changes}), attention)


def tiny_falcon(attention: str = "eager", **changes: Any) -> nn.Module:
    """Calls torch's fused attention itself where it is to be fused."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 60, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}
    return _build(FalconForCausalLM, FalconConfig(**{**sizes, "initializer_range": 0.2, **changes}), attention)


def tiny_minimax(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Linear attention in its second layer."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    special = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
    }
    return _build(MiniMaxForCausalLM, MiniMaxConfig(**{**_SIZES, **special, **changes}), attention)


def tiny_bert(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """An encoder: no causality."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {name: size for name, size in _SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return _build(BertForMaskedLM, BertConfig(**{**sizes, "hidden_size": 60, **changes}), attention)


def tiny_gemma2(attention: str = "eager", **changes: Any) -> nn.Module:
    """A soft cap on the logits: only the eager kernel computes it on a CPU."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    special = {"attn_logit_softcapping": 2.0, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": HEAD_DIM}
    return _build(Gemma2ForCausalLM, Gemma2Config(**{**_SIZES, **special, **changes}), attention)


def tiny_gpt_oss(attention: str = "eager", **changes: Any) -> nn.Module:
    """Attention sinks: the weights of a row sum to less than 1."""
    from transformers import GptOssConfig, GptOssForCausalLM

    special = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2) + ["full_attention"] * (N_LAYERS % 2),
    }
    return _build(GptOssForCausalLM, GptOssConfig(**{**_SIZES, **special, **changes}), attention)


def tiny_mamba() -> nn.Module:
    """No attention at all."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=24, state_size=4, num_hidden_layers=N_LAYERS)
    return _build(MambaForCausalLM, config, None)


def tiny_t5(attention: str = "sdpa") -> nn.Module:
    """An encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=36, d_kv=6, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    return _build(T5ForConditionalGeneration, config, attention)


def with_lora(model: nn.Module, seed: int = 1, **lora: Any) -> Any:
    """A PeftModel around ``model`` whose LoRA changes the output (PEFT starts B at zero, which would hide mistakes)."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    peft_model = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    return peft_model


def save_llama(path: Path, **changes: Any) -> Path:
    """Write a tiny Llama whose matrices have sides that are multiples of 64, as 4-bit blocks want them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 8}
    tiny_llama(**{**sizes, **changes}).save_pretrained(path)
    return path


def nf4_llama(path: Path, attention: str = "sdpa", double_quant: bool = True, **changes: Any) -> nn.Module:
    """The tiny Llama saved under ``path`` (written there if missing), in NF4, on the CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (path / "config.json").exists():
        save_llama(path, **changes)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, attn_implementation=attention, dtype=torch.float32, device_map="cpu"
    ).eval()


def padded_batch(padding: str, lengths: tuple[int, ...] = (19, 13, 4, 19, 11), seed: int = 2) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (5, 19): ``padding`` is "none", "left", "right" or "mixed" sides."""
    length = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (len(lengths), length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for i, n_real in enumerate(lengths if padding != "none" else ()):
        left = padding == "left" or (padding == "mixed" and i % 2 == 1)
        padded = slice(0, length - n_real) if left else slice(n_real, length)
        attention_mask[i, padded] = 0
        input_ids[i, padded] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class LargestOutput(TorchDispatchMode):
    """Remembers the largest number of elements that any operation inside the block returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def _build(model_class: Any, config: Any, attention: str | None) -> nn.Module:
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class._from_config(config, **options).eval()
