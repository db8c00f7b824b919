"""The demo's base trained three times as long, and in other architectures, for the experiments that compare them.

python -m benchmarks.architecture_bases runs/data/bases  # a folder for each of ARCHITECTURES, ten minutes each
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from seekr_peft.demo.train_base import LLAMA, SHAPE, build_tokenizer, train

ARCHITECTURES: dict[str, dict[str, object]] = {
    # The demo's own.
    "llama": LLAMA,
    # Attention and MLP side by side, LayerNorm, biases. A quarter of a head of 16 would be too little to rotate.
    "gpt_neox": {"intermediate_size": 512, "rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}},
    # Heads that share keys, norms on q and k.
    "qwen3": {"intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 16},
}
"""What each needs beyond the layers, heads and widths that are the same for all."""


def build_model(architecture: str) -> PreTrainedModel:
    """Untrained base of ``architecture`` with the shape of the demo's: 4 layers, 8 heads, hidden size 128."""
    config = AutoConfig.for_model(architecture, **SHAPE, **ARCHITECTURES[architecture])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def main() -> None:
    """Command line: train each base and write it with its tokenizer into a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    for architecture in options.architectures.split(","):
        print(architecture, flush=True)
        torch.manual_seed(0)
        model = build_model(architecture)
        train(model, options.steps, batch_size=128, peak_rate=2e-3, seed=0)
        model.to(torch.bfloat16).save_pretrained(options.out / architecture)
        build_tokenizer().save_pretrained(options.out / architecture)


if __name__ == "__main__":
    main()
