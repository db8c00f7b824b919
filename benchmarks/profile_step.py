"""Where the time of one replay step goes, and the floor: operations and bytes that it cannot do without.

python -m benchmarks.profile_step [--length 1024] [--samples 1] [--threads 1 | --device cuda]

On a CPU each part is timed where it runs. A GPU works apart from the host that starts its kernels, so there the wall
time, the GPU's own time and the number of kernels are told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.replay_step import (
    QUERIES,
    SMALL,
    StoredSamples,
    build_model,
    drawn_heads,
    make_sample,
    measure,
    replay_with_logits,
    selected_heads,
)
from benchmarks.timing import synchronise
from seekr_peft import AttentionTap
from seekr_peft.attention import row_kl
from seekr_peft.model.answers import answer_logits

BASE = "replay + logits"


def seconds_by_part(length: int, repeats: int, n_samples: int = 1) -> dict[str, float]:
    """Medians of the step without attention, and of the parts that attention distillation adds to it, each timed where
    it runs, with caches as cold as in a training."""
    model = build_model(length, "sdpa", "cpu")
    with TemporaryDirectory() as folder:
        tasks = [selected_heads()] if n_samples == 1 else drawn_heads(n_samples)
        stored = StoredSamples(folder, model, make_sample(length), tasks, "cpu")
        rounds = [_one_round(model, stored) for _ in range(repeats + 1)][1:]
    return {part: statistics.median(seconds[part] for seconds in rounds) for part in rounds[0]}


def _one_round(model: nn.Module, stored: StoredSamples) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[part] += time.perf_counter() - started
        return result

    def observe(layer: int, call: Any) -> Tensor:
        teacher = batch.layers[layer]
        rows = timed("selecting q, k and the mask", lambda: call.pair_inputs(teacher.pairs))
        loss = timed("row KL and its gradient", lambda: row_kl(rows, teacher.rows, teacher.weights))
        inputs = call.query, call.key
        timed("backward to all heads' q and k", lambda: torch.autograd.grad(loss, inputs, retain_graph=True))
        return loss

    timed(BASE, lambda: replay_with_logits(model, stored.batch("logits")).backward())
    timed("logits alone", lambda: stored.batch("logits"))
    batch = timed("reading the stored rows", lambda: stored.batch("rows"))
    tap = timed("hooks", lambda: AttentionTap(model, batch.heads, batch.queries, observe=observe))
    timed("hooks", tap.__enter__)
    answer_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
    timed("hooks", lambda: tap.__exit__(None, None, None))
    seconds["reading the stored rows"] -= seconds.pop("logits alone")
    return seconds


def floor(length: int) -> dict[str, float]:
    """Operations of the step without and of the capture, and bytes that the capture must move.

    Frozen weights: a forward and a gradient of the activations, 2 operations a weight and token each. The capture
    multiplies q k^T and two gradients; its rows are written and read once.
    """
    shape = SMALL
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * (shape.hidden * 43 // 16))
    head_dim = shape.hidden // shape.heads
    n_heads = selected_heads(shape).n_heads
    attention = 3.5 * 4 * shape.layers * length**2 / 2 * shape.hidden  # causal; the backward does 2.5 times the forward
    logits = n_heads * QUERIES * length
    return {
        "step_operations": 4 * weights * length + attention,
        "capture_operations": 3 * 2 * logits * head_dim,
        "capture_bytes": 2 * 4 * logits + 2 * 4 * n_heads * (QUERIES + length) * head_dim,
    }


def machine_speed(device: str = "cpu", repeats: int = 20) -> tuple[float, float]:
    """Operations a second of a float32 matrix product, and bytes a second of a copy, at best."""
    size, numbers = (4096, 2**28) if device == "cuda" else (768, 2**24)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source = torch.randn(numbers, device=device)
    products, copies = [], []
    for _ in range(repeats):
        products.append(_seconds(lambda: a @ b, device))
        copies.append(_seconds(source.clone, device))
    return 2 * size**3 / min(products), 2 * source.nbytes / min(copies)


def _seconds(work: Callable[[], object], device: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=1, help="of as many tasks, each with heads of its own (CPU)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    base, capture = print_parts(console, options) if options.device == "cpu" else print_device(console, options)
    needed, (operations, bandwidth) = floor(options.length), machine_speed(options.device)
    needed = {name: options.samples * amount for name, amount in needed.items()}
    floor_step = needed["step_operations"] / operations
    floor_capture = max(needed["capture_operations"] / operations, needed["capture_bytes"] / bandwidth)
    console.print(
        f"machine: {operations / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n"
        f"step without: {needed['step_operations'] / 1e9:.1f} GFLOP, floor {1000 * floor_step:.3g} ms, "
        f"measured x {base / floor_step:.1f}\n"
        f"capture: {needed['capture_operations'] / 1e9:.2f} GFLOP and {needed['capture_bytes'] / 1e6:.1f} MB, "
        f"floor {1000 * floor_capture:.2g} ms, measured x {capture / floor_capture:.1f}"
    )


def print_parts(console: Console, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the step without attention and of what attention distillation adds, part by part."""
    parts = seconds_by_part(options.length, options.repeats, options.samples)
    title = f"One replay step, {options.samples} x {options.length} tokens, {options.threads} thread(s)"
    table = Table(title=title, title_justify="left")
    for heading in ("part", "ms", "share of the step without"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    base, capture = parts[BASE], sum(seconds for part, seconds in parts.items() if part != BASE)
    for name, own in {**parts, "attention distillation": capture}.items():
        table.add_row(name, f"{1000 * own:.1f}", f"{100 * own / base:.1f} %")
    console.print(table)
    return base, capture


def print_device(console: Console, options: argparse.Namespace) -> tuple[float, float]:
    """The same two of a GPU's own time."""
    row = measure(options.length, options.repeats, "cuda")
    title = f"One replay step, T = {options.length}, {torch.cuda.get_device_name()}"
    table = Table(title=title, title_justify="left")
    for heading in ("step", "wall, ms", "GPU, ms", "kernels"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, seconds in row.seconds.items():
        own = row.device_seconds[name]
        table.add_row(name, f"{1000 * seconds:.1f}", f"{1000 * own:.2f}", str(row.launches[name]))
    console.print(table)
    base = row.device_seconds[BASE]
    return base, row.device_seconds["with attention"] - base


if __name__ == "__main__":
    main()
