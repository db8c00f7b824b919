"""Train the demo's base model from generated text and save it as package data.

    python -m seekr_peft.demo.train_base --out seekr_peft/demo/base

Lives here: the tokenizer, the architecture and the training loop of the base. A script: the package
imports nothing from it. It needs no data and no network, takes a few minutes on two CPU cores, and
repeats itself for one seed and one thread count on one machine.
"""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..tasks.demo_words import base_lines, vocabulary

PAD, BOS, EOS, UNK = range(4)
"""Ids of the special tokens, the places they have in ``vocabulary``."""

SHAPE: dict[str, Any] = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    # Untied: in a tied matrix the never seen cue words would all be pushed the same way and look alike.
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
"""What the base shares with those of other architectures that are trained on the same text."""

LLAMA: dict[str, Any] = {"intermediate_size": 256, "num_key_value_heads": 8, "head_dim": 16}
"""What a Llama needs beside that."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: one token a word, ``<bos>`` in front, decoded with spaces between."""
    tokens = vocabulary()
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # Llama takes no token_type_ids, and generate() refuses inputs that the model does not take.
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=128,
    )


def build_model() -> LlamaForCausalLM:
    """Untrained base model. All widths are multiples of 64, the block size of NF4."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA))


def encode_batch(lines: Sequence[tuple[list[str], list[str]]], ids: dict[str, int]) -> dict[str, torch.Tensor]:
    """Right-padded batch of training lines; only answer words and ``<eos>`` carry labels.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``(batch, length)``; a label of
        -100 is ignored.
    """
    rows, labels = [], []
    for prompt, answer in lines:
        question = [BOS, *(ids[word] for word in prompt)]
        target = [*(ids[word] for word in answer), EOS]
        rows.append(question + target)
        labels.append([-100] * len(question) + target)
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
    }


def train(model: PreTrainedModel, steps: int, batch_size: int, peak_rate: float, seed: int) -> None:
    """Train ``model`` in place on fresh lines each step; prints the loss, nats per answer token."""
    draw = random.Random(seed)
    ids = {token: index for index, token in enumerate(vocabulary())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.1)
    model.train()
    started, recent = time.perf_counter(), []
    for step in range(1, steps + 1):
        loss = model(**encode_batch(base_lines(draw, batch_size), ids)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean = sum(recent) / len(recent)
            print(
                f"step {step}/{steps}  loss {mean:.3f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            recent.clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: train the base and write model and tokenizer to ``--out``."""
    parser = argparse.ArgumentParser(description="Train the base model of the embedded demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=128, help="lines of text a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the text")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    model = build_model()
    train(model, options.steps, options.batch_size, options.learning_rate, options.seed)
    model.to(torch.bfloat16).save_pretrained(options.out)
    build_tokenizer().save_pretrained(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
