"""The replay step with attention distillation against the same step without it, and against the eager way.

    python -m benchmarks.replay_step [--device cuda] [--lengths 512 1024 2048] [--out FILE.json]

One process; the variants take turns, so that a drift of the machine's speed hits all of them. A step is what a training
does: read the sample from the memory on disk, forward, backward. Prints time and peak memory as ratios to the step with
replay and logits only, and the bytes that one replay sample takes on disk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import device_work, median_seconds, peak_bytes
from seekr_peft import AttentionTap, HeadSelection, SeekrConfig
from seekr_peft.attention.row_divergence import kl_of_rows
from seekr_peft.losses import combine, label_loss, logits_kl
from seekr_peft.memory import PackedSignals, ReplayBatch, ReplayMemory, ReplaySample, TaskMemory, draw_queries
from seekr_peft.methods.head_scores import teach
from seekr_peft.model.answers import answer_logits, answer_positions
from seekr_peft.model.peak_memory import PeakMemory
from seekr_peft.tasks.tokenize import IGNORED_LABEL

QUERIES = 100
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """Of the random Llama that is measured."""

    layers: int
    heads: int
    hidden: int


SMALL, WIDE = Shape(8, 8, 256), Shape(4, 16, 1024)


@dataclass(frozen=True)
class Row:
    """One length: medians of seconds and peak bytes by variant, a GPU's own seconds and kernels, and bytes on disk of a
    sample."""

    length: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    device_seconds: dict[str, float]
    launches: dict[str, int]
    sample_bytes: int
    sample_bytes_dense: int


def build_model(length: int, implementation: str, device: str, shape: Shape = SMALL) -> nn.Module:
    """A random Llama with LoRA on every linear layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 43 // 16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=length,
        attn_implementation=implementation,
    )
    base = LlamaForCausalLM(config).to(device)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()


def selected_heads(shape: Shape = SMALL) -> HeadSelection:
    """12.5 % of the heads in 75 % of the layers, spread."""
    layers = range(shape.layers - round(0.75 * shape.layers), shape.layers)
    count = round(0.125 * shape.layers * shape.heads)
    heads: dict[int, list[int]] = {}
    for i in range(count):
        heads.setdefault(layers[i % len(layers)], []).append(i // len(layers))
    return HeadSelection(heads)


def make_sample(length: int) -> ReplaySample:
    """A random sample whose last tokens are the answer."""
    input_ids = torch.randint(3, 4096, (length,), generator=torch.Generator().manual_seed(length))
    labels = torch.full((length,), IGNORED_LABEL)
    labels[-ANSWER_TOKENS:] = input_ids[-ANSWER_TOKENS:]
    return ReplaySample(input_ids, labels, draw_queries(length, QUERIES, seed=0))


class StoredSamples:
    """The same taught sample once for each of ``tasks``, which are the heads that a task selected, in two replay
    memories below ``folder``: with attention rows and without."""

    def __init__(
        self, folder: str, model: nn.Module, sample: ReplaySample, tasks: Sequence[HeadSelection], device: str
    ) -> None:
        self.device = torch.device(device)
        self.memories = {
            kind: ReplayMemory(
                [
                    TaskMemory.write(
                        Path(folder) / f"{kind}{number}", kind, [sample], _teach(model, sample, chosen), chosen
                    )
                    for number, chosen in enumerate(selections)
                ]
            )
            for kind, selections in (("rows", tasks), ("logits", [HeadSelection({})] * len(tasks)))
        }
        self.bytes = self.memories["rows"].tasks[0].bytes
        self.bytes_dense = 4 * (tasks[0].n_heads * len(sample.queries) * len(sample.input_ids) + ANSWER_TOKENS * 4096)

    def batch(self, kind: str) -> ReplayBatch:
        """Read as a training step does; ``kind``: rows (and logits), or logits."""
        memory = self.memories[kind]
        return memory.batch([(task, 0) for task in range(len(memory.tasks))], device=self.device)


def _teach(model: nn.Module, sample: ReplaySample, heads: HeadSelection) -> list[PackedSignals]:
    config = SeekrConfig()
    signals, _, _ = teach(
        model,
        [sample],
        heads,
        config.row_top_k,
        config.logit_top_k,
        config.kept_mass,
        keep=lambda found: PackedSignals.of(found, heads, config.storage_dtype),
    )
    return list(signals)


def replay_with_logits(model: nn.Module, batch: ReplayBatch) -> Tensor:
    """Replay and logits only: the base of all ratios."""
    logits, targets = answer_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
    return combine(label_loss(logits, targets), logits_kl(logits, _logits(batch)), None, 0.5, 0.0).total


def with_attention(model: nn.Module, batch: ReplayBatch) -> Tensor:
    """The same with attention distillation; the caller runs backward inside the tap."""

    def observe(layer: int, call: Any) -> Tensor:
        teacher = batch.layers[layer]
        return call.pair_kl(teacher.pairs, teacher.rows, teacher.weights)

    with AttentionTap(model, batch.heads, batch.queries, observe=observe, keep_graph=True) as tap:
        logits, targets = answer_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
        attention = torch.stack(list(tap.values.values())).sum()
        terms = combine(label_loss(logits, targets), logits_kl(logits, _logits(batch)), attention, 0.5, 10.0)
        terms.total.backward()
    return terms.total.detach()


def with_eager_attention(model: nn.Module, batch: ReplayBatch) -> Tensor:
    """The usual way: eager attention, output_attentions=True, KL on the gathered rows."""
    outputs = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_attentions=True
    )
    sample, position, targets = answer_positions(batch.labels)
    logits = outputs.logits[sample, position]
    attention = logits.new_zeros(())
    for layer, teacher in batch.layers.items():
        rows = teacher.pairs.queries(outputs.attentions[layer], batch.queries)
        attention = attention + kl_of_rows(rows, teacher.rows, teacher.weights)
    return combine(label_loss(logits, targets), logits_kl(logits, _logits(batch)), attention, 0.5, 10.0).total


def measure(length: int, repeats: int, device: str) -> Row:
    """Time and peak memory of each variant's forward and backward at one length, batch 1."""
    sdpa, eager = build_model(length, "sdpa", device), build_model(length, "eager", device)
    with TemporaryDirectory() as folder:
        stored = StoredSamples(folder, sdpa, make_sample(length), [selected_heads()], device)
        variants: dict[str, Callable[[], object]] = {
            **steps(sdpa, stored),
            "eager attention": lambda: with_eager_attention(eager, stored.batch("rows")).backward(),
        }
        peaks, seconds = peak_bytes(variants, device), median_seconds(variants, repeats, device)
        work = device_work(variants, device)
        return Row(
            length,
            seconds,
            peaks,
            {name: own.seconds for name, own in work.items()},
            {name: own.launches for name, own in work.items()},
            stored.bytes,
            stored.bytes_dense,
        )


def steps(model: nn.Module, stored: StoredSamples) -> dict[str, Callable[[], object]]:
    """The step without attention distillation and with it."""
    return {
        "replay + logits": lambda: replay_with_logits(model, stored.batch("logits")).backward(),
        "with attention": lambda: with_attention(model, stored.batch("rows")),
    }


def time_ratio(length: int, repeats: int, device: str, shape: Shape = SMALL, threads: int | None = None) -> float:
    """Median time of the step with attention distillation over that without, in turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        model = build_model(length, "sdpa", device, shape)
        with TemporaryDirectory() as folder:
            stored = StoredSamples(folder, model, make_sample(length), [selected_heads(shape)], device)
            seconds = median_seconds(steps(model, stored), repeats, device)
        return seconds["with attention"] / seconds["replay + logits"]
    finally:
        torch.set_num_threads(before)


def mixed_batch(length: int, repeats: int, device: str, n_tasks: int = 8) -> dict[str, float]:
    """Time and peak memory with attention over those without, of a batch of one sample of each of ``n_tasks`` tasks,
    every one of which has drawn its heads by itself."""
    model = build_model(length, "sdpa", device)
    with TemporaryDirectory() as folder:
        variants = steps(model, StoredSamples(folder, model, make_sample(length), drawn_heads(n_tasks), device))
        peaks, seconds = peak_bytes(variants, device), median_seconds(variants, repeats, device)
    return {
        "time": seconds["with attention"] / seconds["replay + logits"],
        "peak": peaks["with attention"] / peaks["replay + logits"],
    }


def drawn_heads(n_tasks: int, shape: Shape = SMALL) -> list[HeadSelection]:
    """For each task as many as ``selected_heads``, anywhere in as many layers."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(n_tasks):
        layers = torch.randperm(shape.layers, generator=generator)[: round(0.75 * shape.layers)].tolist()
        places = torch.randperm(len(layers) * shape.heads, generator=generator)[: selected_heads(shape).n_heads]
        chosen = [divmod(place, shape.heads) for place in places.tolist()]
        found.append(HeadSelection({layer: [head for i, head in chosen if i == at] for at, layer in enumerate(layers)}))
    return found


def extra_peak(length: int, device: str) -> int:
    """Peak bytes that the capture adds to a replay step's forward and backward, apart from its peak elsewhere."""
    model = build_model(length, "sdpa", device)
    with TemporaryDirectory() as folder:
        batch = StoredSamples(folder, model, make_sample(length), [selected_heads()], device).batch("rows")
    teacher = batch.layers
    calls: dict[int, Any] = {}

    def keep(layer: int, call: Any) -> Tensor:
        calls[layer] = call
        return call.query

    with AttentionTap(model, batch.heads, batch.queries, observe=keep):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    with PeakMemory(device) as memory:
        losses = [calls[layer].pair_kl(found.pairs, found.rows, found.weights) for layer, found in teacher.items()]
        queries = [calls[layer].query for layer in teacher]
        torch.autograd.grad(torch.stack(losses).sum(), queries)
    return memory.peak


def _logits(batch: ReplayBatch) -> Any:
    assert batch.logits is not None
    return batch.logits


def table(rows: list[Row], machine: str) -> Table:
    """Ratios to "replay + logits", which are the goals' unit."""
    result = Table(title=f"One replay step (forward and backward, batch 1), {machine}", title_justify="left")
    headings = (
        "T",
        "replay + logits",
        "time with attention",
        "eager",
        "peak with attention",
        "eager",
        "stored",
        "dense",
    )
    for heading in headings:
        result.add_column(heading, justify="right")
    for row in rows:
        base_time, base_peak = row.seconds["replay + logits"], row.peak_bytes["replay + logits"]
        result.add_row(
            str(row.length),
            f"{1000 * base_time:.0f} ms, {base_peak / 2**20:.0f} MiB",
            *(f"x {row.seconds[name] / base_time:.2f}" for name in ("with attention", "eager attention")),
            *(f"x {row.peak_bytes[name] / base_peak:.2f}" for name in ("with attention", "eager attention")),
            f"{row.sample_bytes / 1000:.0f} kB",
            f"{row.sample_bytes_dense / 1000:.0f} kB",
        )
    return result


def main() -> None:
    """Run and print; ``--out`` also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = [measure(length, options.repeats, options.device) for length in options.lengths]
    Console(width=130).print(table(rows, machine))
    Console(width=130).print(
        "12.5 % of the heads in 75 % of the layers, 100 queries; stored as by default, dense is float32."
    )
    if options.out:
        document = {"machine": machine, "torch": torch.__version__, "rows": [vars(row) for row in rows]}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
