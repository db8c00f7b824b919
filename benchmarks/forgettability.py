"""Does a head's score predict what its changed attention costs the old tasks? By grafting the old attention back.

    python -m benchmarks.forgettability RUN [RUN ...] --out FOLDER

Each RUN is a finished run that forgot something (method sequential). For every task k but the last, the model right
after task k + 1 answers task k's test samples once for each head, with that head's attention replaced by what the model
right after task k had on the same sample. What the old task's loss falls by is what the head's change had cost. That is
ranked against what the method could know: the head's forgettability, sensitivity and importance on the samples of
task k + 1, and its change on the old samples. Spearman's correlation, with a permutation p-value over all pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from seekr_peft.attention import head_shape
from seekr_peft.attention.models import base_transformer
from seekr_peft.config import SeekrConfig
from seekr_peft.heads import HeadSelection, normalise_per_layer
from seekr_peft.losses import label_loss
from seekr_peft.memory import ReplaySample, choose_samples
from seekr_peft.methods import get_method
from seekr_peft.methods.head_scores import attention_rows, changes_and_gradients
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.answers import answer_logits, evaluation_mode
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.base_model import load_model
from seekr_peft.report.figures import OKABE_ITO, report_style, to_png
from seekr_peft.run.directory import is_finished
from seekr_peft.run.task_data import load_tasks

SCORES = ("forgettability", "sensitivity", "importance", "change on the old samples")
N_SAMPLES = 40
N_PERMUTATIONS = 10_000


@dataclass
class Graft:
    """What the next forward's attention is to be replaced with: ``rows[layer]`` (n_heads, T, T), for ``heads``."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, list[int]] = field(default_factory=dict)


_GRAFT = Graft()


def grafted_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The stock sdpa attention, with the output of the grafted heads computed from the old rows."""
    output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    heads = _GRAFT.heads.get(layer, [])
    if heads:
        groups = query.shape[1] // value.shape[1]
        values = value.repeat_interleave(groups, dim=1)[0, heads]
        # (batch, T, heads, head size), as attention functions return it.
        output = output.clone()
        output[0, :, heads] = (_GRAFT.rows[layer][heads].to(values.dtype) @ values).transpose(0, 1)
    return output, weights


@contextmanager
def grafting(model: nn.Module) -> Iterator[None]:
    """Let the model's attention layers look for a graft."""
    name = "sdpa_with_graft"
    AttentionInterface.register(name, grafted_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    transformer = base_transformer(model)
    transformer.set_attn_implementation(name)
    try:
        yield
    finally:
        transformer.set_attn_implementation("sdpa")
        _GRAFT.rows, _GRAFT.heads = {}, {}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; ties get their mean rank; 0 where one side is constant."""
    return _correlation(_ranks(first), _ranks(second))


def permutation_p(pairs: list[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> tuple[float, float]:
    """Mean rank correlation of ``pairs``, and the share of permutations (of the heads in each pair) that reach it."""
    ranked = [(_ranks(a), _ranks(b)) for a, b in pairs]
    observed = float(np.mean([_correlation(a, b) for a, b in ranked]))
    generator = np.random.default_rng(seed)
    reached = 0
    for _ in range(N_PERMUTATIONS):
        mean = np.mean([_correlation(a, generator.permutation(b)) for a, b in ranked])
        reached += mean >= observed - 1e-12
    return observed, (reached + 1) / (N_PERMUTATIONS + 1)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def model_after(recipe: Recipe, run: Path, n_tasks: int) -> Any:
    """The base with the adapters of the run's first ``n_tasks`` tasks, frozen."""
    model, _ = load_model(recipe)
    stack = AdapterStack(model, recipe.adapter.mode, recipe.adapter.rank_limit)
    folders = sorted(path for path in (run / "tasks").iterdir() if path.is_dir())
    stack.restore([folder / "adapter" for folder in folders[:n_tasks]])
    return model.requires_grad_(False)


@torch.no_grad()
def old_loss(
    model: Any, samples: list[ReplaySample], rows: list[dict[int, Tensor]], heads: dict[int, list[int]]
) -> float:
    """Mean loss (nats per answer token) on ``samples`` with the old attention of ``heads`` grafted in."""
    total, count = 0.0, 0
    for sample, old in zip(samples, rows, strict=True):
        _GRAFT.rows, _GRAFT.heads = old, heads
        ids = sample.input_ids[None]
        logits, targets = answer_logits(model, ids, torch.ones_like(ids), sample.labels[None])
        total += float(label_loss(logits, targets)) * len(targets)
        count += len(targets)
    return total / count


def measure_pair(recipe: Recipe, run: Path, k: int, tasks: list[Any], tokenizer: Any) -> dict[str, Any]:
    """Task ``k`` (from 0) under the model after task k + 1: every head's scores and what grafting it brings back."""
    before, after = model_after(recipe, run, k + 1), model_after(recipe, run, k + 2)
    n_layers, n_heads = head_shape(after)
    every = HeadSelection.all(n_layers, n_heads)
    config = recipe.method_config_as(SeekrConfig)
    length = recipe.tasks.max_length
    old_task, new_task = (tasks[place].tokenized(tokenizer, length) for place in (k, k + 1))
    # Of the test split: the model has not seen them.
    test = type(old_task).from_records("test", old_task.test, old_task.test).tokenized(tokenizer, length).train
    old = choose_samples(test, min(1.0, N_SAMPLES / len(test)), None, 0)
    new = choose_samples(new_task.train, config.replay_ratio, config.query_budget, config.seed + k + 1)
    scores = torch.zeros(3, n_layers, n_heads, dtype=torch.float64)
    with evaluation_mode(before), evaluation_mode(after):
        for sample in new:
            with torch.no_grad():
                rows = attention_rows(before, sample, every)
            changes, squares = changes_and_gradients(after, sample, every, rows, every_query=False)
            for layer in every:
                scores[0, layer] += changes[layer].double().sqrt() / len(new)
                scores[1, layer] += squares[layer].double().sqrt() / len(new)
        with torch.no_grad():
            old_rows = [attention_rows(before, sample, every) for sample in old]
            for sample, rows in zip(old, old_rows, strict=True):
                new_rows = attention_rows(after, sample, every)
                for layer in every:
                    scores[2, layer] += (new_rows[layer] - rows[layer]).square().sum((-1, -2)).double().sqrt() / len(
                        old
                    )
        learnt = old_loss(before, old, old_rows, {})
        with grafting(after):
            forgot = old_loss(after, old, old_rows, {})
            whole = old_loss(after, old, old_rows, {layer: list(range(n_heads)) for layer in range(n_layers)})
            regained = [
                [forgot - old_loss(after, old, old_rows, {layer: [head]}) for head in range(n_heads)]
                for layer in range(n_layers)
            ]
    sensitivity = normalise_per_layer(scores[1])
    return {
        "run": str(run),
        "old": tasks[k].name,
        "new": tasks[k + 1].name,
        "loss_when_learnt": learnt,
        "loss_now": forgot,
        "loss_with_all_old_attention": whole,
        "regained": regained,
        "forgettability": scores[0].tolist(),
        "sensitivity": sensitivity.tolist(),
        "importance": (scores[0] * sensitivity).tolist(),
        "change on the old samples": scores[2].tolist(),
    }


def draw(pairs: list[dict[str, Any]]) -> Figure:
    """Each head's rank under each score against the rank of what grafting it brings back."""
    with report_style():
        figure = Figure(figsize=(2.6 * len(SCORES) + 0.4, 3.1), layout="constrained")
        panels = figure.subplots(1, len(SCORES), sharey=True)
        for axes, score in zip(panels, SCORES, strict=True):
            for place, pair in enumerate(pairs):
                x, y = np.ravel(pair[score]), np.ravel(pair["regained"])
                axes.plot(
                    _ranks(x) / len(x), _ranks(y) / len(y), ".", color=OKABE_ITO[place % 6], alpha=0.35, markersize=4
                )
            mean, p = permutation_p([(np.ravel(pair[score]), np.ravel(pair["regained"])) for pair in pairs])
            axes.set_title(f"{score}\nmean correlation {mean:+.2f} (p = {p:.4f})", size=8)
            axes.set_xlabel("rank of the head's score")
        panels[0].set_ylabel("rank of the loss that its\nold attention brings back")
    return figure


def table(pairs: list[dict[str, Any]]) -> Table:
    """Losses of each pair, and the rank correlation of every score."""
    result = Table(title="What the old attention brings back, in nats an answer token", title_justify="left")
    for heading in ("old task, new task", "learnt", "now", "all heads old", "best head", *SCORES):
        result.add_column(heading, justify="left" if heading.startswith("old") else "right")
    for pair in pairs:
        regained = np.ravel(pair["regained"])
        result.add_row(
            f"{pair['old']}, {pair['new']}",
            f"{pair['loss_when_learnt']:.3f}",
            f"{pair['loss_now']:.3f}",
            f"{pair['loss_with_all_old_attention']:.3f}",
            f"{pair['loss_now'] - regained.max():.3f}",
            *(f"{spearman(np.ravel(pair[score]), regained):+.2f}" for score in SCORES),
        )
    result.add_section()
    means = [permutation_p([(np.ravel(pair[score]), np.ravel(pair["regained"])) for pair in pairs]) for score in SCORES]
    result.add_row("mean (p)", "", "", "", "", *(f"{mean:+.2f} ({p:.4f})" for mean, p in means))
    return result


def main() -> None:
    """Measure all pairs of tasks of all runs, print, and write forgettability.json and .png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments/forgettability"))
    options = parser.parse_args()
    pairs: list[dict[str, Any]] = []
    for run in options.runs:
        if not is_finished(run):
            raise SystemExit(f"{run} is no finished run; give folders of `seekr-peft run` or `compare`.")
        recipe = load_recipe(run / "recipe.yaml")
        if get_method(recipe.method_name).joint:
            raise SystemExit(f"{run} trained all tasks at once, so nothing was forgotten; give a run of a sequence.")
        tasks, (_, tokenizer) = load_tasks(recipe), load_model(recipe)
        pairs += [measure_pair(recipe, run, k, tasks, tokenizer) for k in range(len(tasks) - 1)]
        print(f"{run}: {len(tasks) - 1} pairs", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "forgettability.json").write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
    (options.out / "forgettability.png").write_bytes(to_png(draw(pairs)))
    Console(width=150).print(table(pairs))


if __name__ == "__main__":
    main()
