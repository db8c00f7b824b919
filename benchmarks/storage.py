"""Bytes and exactness of what is stored, and what reading it costs.

python -m benchmarks.storage RUN  # what a finished run stored of each of its tasks
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.replay_step import make_sample
from seekr_peft import AttentionTap, HeadSelection, SeekrConfig
from seekr_peft.errors import RunError, SeekrError
from seekr_peft.memory import PackedSignals, TaskMemory, TeacherSignals, draw_queries, estimate_bytes
from seekr_peft.memory.codec import pack, unpack
from seekr_peft.memory.storage import GAP_DTYPES
from seekr_peft.model.answers import answer_logits
from seekr_peft.sparse import SparseDistribution, sparse_rows

HEADS_7B, QUERIES = 128, 100


def bytes_7b(vocabulary: int) -> int:
    """Bytes of one replay sample of a 7B model at most: 32 layers of 32 heads, 128 selected, T = 1024."""
    config = SeekrConfig()
    sample = make_sample(1024)
    top_k = config.row_top_k, config.logit_top_k
    one, two = (estimate_bytes([sample] * n, HEADS_7B, *top_k, vocabulary, config.storage_dtype) for n in (1, 2))
    return two - one


def kl_of_stored(folder: Path, text: str, length: int) -> dict[str, float]:
    """Mean KL (nats) between a real model's exact rows and answers and what is read back, with the remaining mass
    spread evenly over the keys or tokens that are not stored; and the entropies, for scale."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    heads = HeadSelection.all(model.config.num_hidden_layers, model.config.num_attention_heads)
    queries = draw_queries(length, QUERIES, seed=0)
    with torch.no_grad(), AttentionTap(model, heads, queries=queries[None]) as tap:
        logits = model(input_ids=ids).logits[0, queries]
        exact = {layer: rows[0] for layer, rows in tap.rows.items()}
    config = SeekrConfig()
    kept = sparse_rows(exact, config.row_top_k, config.kept_mass)
    rows = [(exact[layer], _round_trip(kept[layer], "rows", config), queries + 1) for layer in exact]
    row_kl = torch.cat([_spread_kl(dense, stored, visible).flatten() for dense, stored, visible in rows]).mean()
    answers = SparseDistribution.from_logits(logits, config.logit_top_k, config.kept_mass)
    stored = _round_trip(answers, "logits", config)
    probabilities = logits.softmax(-1)
    n_tokens = torch.full((len(queries),), logits.shape[-1])
    return {
        "rows_kl": float(row_kl),
        "rows_entropy": float(torch.cat([_entropy(dense).flatten() for dense in exact.values()]).mean()),
        "logits_kl": float(_spread_kl(probabilities, stored, n_tokens).mean()),
        "logits_entropy": float(_entropy(probabilities).mean()),
    }


def kl_of_run(run: Path) -> dict[str, dict[str, float]]:
    """The same by task for what a finished run stored: its own samples, answers and selected heads."""
    from peft import PeftModel

    from seekr_peft.model.bitsandbytes_cpu import keep_differentiable
    from seekr_peft.recipe import load_recipe
    from seekr_peft.recipe.base_model import load_model

    recipe = load_recipe(run / "recipe.yaml")
    folders = sorted((run / "tasks").iterdir())
    for folder in folders:
        memory = TaskMemory(folder)
        if not memory.selection or memory.packed(0).logits is None:
            raise RunError(f"{folder} keeps no attention rows or no logits; give a run of method seekr with both.")
    base, _ = load_model(recipe)
    model = PeftModel.from_pretrained(base.unload(), folders[0] / "adapter", folders[0].name).eval()
    # The teacher was recorded without the rounding that bitsandbytes adds in eval mode on some CPUs.
    keep_differentiable(model)
    found, teacher = {}, []
    for folder in folders:
        if teacher:
            model.load_adapter(folder / "adapter", folder.name)
        # The sum of the adapters up to this task, or the one that went on from the task before. (Past rank_limit the
        # teacher's earlier adapters were a truncated sum; the little that it leaves out counts as inexactness here.)
        teacher = [*teacher, folder.name] if recipe.adapter.mode == "stack" else [folder.name]
        model.base_model.set_adapter(teacher)
        found[folder.name] = _kl_of_memory(model, TaskMemory(folder))
    return found


@torch.no_grad()
def _kl_of_memory(teacher: Any, memory: TaskMemory) -> dict[str, float]:
    rows, row_entropies, answers, answer_entropies = [], [], [], []
    for index in range(len(memory)):
        sample, packed = memory.sample(index), memory.packed(index)
        assert packed.rows is not None and packed.logits is not None
        ids = sample.input_ids[None]
        with AttentionTap(teacher, memory.selection, queries=sample.queries[None]) as tap:
            logits, _ = answer_logits(teacher, ids, torch.ones_like(ids), sample.labels[None])
        # Stored one behind the other: by layer, head, query.
        exact = torch.cat([found[0].flatten(0, 1) for found in tap.rows.values()])
        rows.append(_spread_kl(exact, unpack(packed.rows), (sample.queries + 1).repeat(memory.selection.n_heads)))
        row_entropies.append(_entropy(exact))
        probabilities = logits.softmax(-1)
        n_tokens = torch.full((len(logits),), logits.shape[-1])
        answers.append(_spread_kl(probabilities, unpack(packed.logits), n_tokens))
        answer_entropies.append(_entropy(probabilities))
    return {
        "rows_kl": float(torch.cat(rows).mean()),
        "rows_entropy": float(torch.cat(row_entropies).mean()),
        "logits_kl": float(torch.cat(answers).mean()),
        "logits_entropy": float(torch.cat(answer_entropies).mean()),
        "bytes_per_sample": memory.bytes / len(memory),
    }


def resident_growth(n_samples: int = 60) -> dict[str, float]:
    """Growth of resident memory on opening a memory file and reading one sample, as a share of the file's size."""
    heads, length = HeadSelection({layer: range(16) for layer in range(8)}), 1024
    sample = make_sample(length)
    generator = torch.Generator().manual_seed(0)
    visible = torch.arange(length) <= sample.queries[:, None]
    rows = {
        layer: torch.randn(16, len(sample.queries), length, generator=generator)
        .masked_fill(~visible, float("-inf"))
        .softmax(-1)
        for layer in heads
    }
    config = SeekrConfig()
    signals = TeacherSignals(sparse_rows(rows, config.row_top_k, config.kept_mass), None)
    packed = PackedSignals.of(signals, heads, config.storage_dtype)
    with TemporaryDirectory() as folder:
        TaskMemory.write(Path(folder), "task", [sample] * n_samples, [packed] * n_samples, heads)
        _read_rows(TaskMemory(Path(folder)), 0)  # libraries' own buffers
        before = _resident()
        memory = TaskMemory(Path(folder))
        opened = _resident() - before
        _read_rows(memory, n_samples // 2)
        return {
            "bytes": memory.bytes,
            "opened": opened / memory.bytes,
            "one_sample": (_resident() - before) / memory.bytes,
        }


def _read_rows(memory: TaskMemory, index: int) -> SparseDistribution:
    packed = memory.packed(index).rows
    assert packed is not None
    return unpack(packed)


def _round_trip(rows: SparseDistribution, kind: str, config: SeekrConfig) -> SparseDistribution:
    return unpack(pack(rows, config.storage_dtype, GAP_DTYPES[kind])).reshape(*rows.remaining.shape)


def _spread_kl(exact: Tensor, stored: SparseDistribution, n_possible: Tensor) -> Tensor:
    """KL(exact || stored) of rows (..., n); of each row's n the first ``n_possible`` can have mass."""
    exact = exact.double()
    kept = torch.zeros_like(exact).scatter_add(-1, stored.indices, stored.probabilities.double())
    n_others = (n_possible - (kept > 0).sum(-1)).clamp_min(1)
    spread = (stored.remaining.double() / n_others).clamp_min(1e-12)[..., None]
    approximate = torch.where(kept > 0, kept, spread)
    return torch.where(exact > 0, exact * (exact / approximate).log(), 0).sum(-1)


def _entropy(rows: Tensor) -> Tensor:
    return -torch.special.xlogy(rows, rows).sum(-1)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(shared: Path) -> dict[str, Any]:
    """All of it; the KL only where ``shared`` has the models."""
    found: dict[str, Any] = {
        "bytes_7b": {str(v): bytes_7b(v) for v in (32_000, 152_000)},
        "resident": resident_growth(),
    }
    text_file = shared / "data" / "text" / "wikitext-2_test.txt"
    for name in ("stories260k", "nano-llama-3m"):
        if (shared / "models" / name).is_dir() and text_file.is_file():
            text = text_file.read_text(encoding="utf-8")[:50_000]
            found[f"kl {name}"] = kl_of_stored(shared / "models" / name, text, 512)
    return found


if __name__ == "__main__":
    try:
        print(json.dumps(kl_of_run(Path(sys.argv[1])), indent=2))
    except SeekrError as error:
        raise SystemExit(str(error)) from None
