"""Writes report.html of one run, and what its page shares with that of a comparison.

A page is one file: inline CSS, figures as base64 PNG, no script. Every string that comes from a
file of the run goes through jinja2's autoescape.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ..errors import RunError, printable
from ..files.atomic import write_bytes
from ..files.paths import given_path
from ..loss_names import long_label
from . import figures
from .reading import HeadImportance, RunRecord, TaskMemory, read_predictions, read_run

OP_FORMULA = "OP = mean of the last column, a[i,K] over i"
BWT_FORMULA = "BWT = 1/(K−1) · Σ over i<K of (a[i,K] − a[i,i])"
DASH = "–"
CSS_PIXELS_PER_INCH = 96
ANSWERS_SHOWN = 3


@dataclass(frozen=True)
class Picture:
    """One figure as the template needs it; ``width`` in CSS pixels at natural size."""

    name: str
    alt: str
    png: bytes
    width: int

    @property
    def source(self) -> str:
        """The PNG as a data: address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_report(run_directory: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of one run, and its figures into ``figures/`` beside the page.

    ``out`` is the page's path, or an existing folder to put report.html in; by default
    RUN/report.html. Returns the path of the page. Raises RunError when the directory is not a run
    directory or a file in it is broken.
    """
    run = read_run(run_directory)
    path = given_path(out, "the page") if out is not None else run.directory / "report.html"
    path = path / "report.html" if out is not None and path.is_dir() else path
    pictures = run_pictures(run)
    html = render(
        "report.html.j2",
        title=f"{run.method}: {len(run.tasks)} task{'s' * (len(run.tasks) > 1)}",
        view=run_view(run, pictures),
    )
    write_figures(path.parent / "figures", pictures, list(FIGURE_NAMES))
    replace_file(path, html.encode("utf-8", errors="replace"))
    return path


FIGURE_NAMES = ("accuracy_matrix", "retention", "general", "head_importance", "loss_terms", "memory")


def run_pictures(run: RunRecord) -> dict[str, Picture]:
    """Name -> picture of everything this run has the files for."""
    drawn: dict[str, tuple[Figure | None, str]] = {
        "accuracy_matrix": (
            figures.draw_matrices({run.method: run}),
            f"Heat map of the accuracy matrix. {matrix_words(run)}",
        ),
        "retention": (
            figures.draw_retention({run.method: run}),
            f"One panel a task: accuracy in percent after each later task. {retention_words(run)}",
        ),
        "general": (figures.draw_general({run.method: run}), _general_words(run)),
        "loss_terms": (figures.draw_losses(run), _loss_words(run)),
        "memory": (figures.draw_memory(run), _memory_words(run)),
    }
    if run.heads is not None:
        drawn["head_importance"] = (figures.draw_heads(run.heads), _head_words(run.heads))
    return {name: make_picture(name, figure, alt) for name, (figure, alt) in drawn.items() if figure is not None}


def make_picture(name: str, figure: Figure, alt: str) -> Picture:
    """The figure drawn, with its text alternative."""
    width = round(figure.get_size_inches()[0] * CSS_PIXELS_PER_INCH)
    return Picture(name, alt, figures.to_png(figure), width)


def matrix_words(run: RunRecord) -> str:
    """OP and BWT in one sentence."""
    if run.op is None:
        return "No complete column yet."
    bwt = DASH if run.bwt is None else f"{100 * run.bwt:+.1f} points"
    return f"After task {run.n_scored}: OP {100 * run.op:.1f} %, BWT {bwt}."


def retention_words(run: RunRecord) -> str:
    """The first and the last score of every task in one sentence."""
    words = []
    for index, name in enumerate(run.tasks):
        known = run.scores[index][np.isfinite(run.scores[index])]
        if known.size:
            words.append(f"{name} from {100 * known[0]:.0f} to {100 * known[-1]:.0f}")
    return ("Percent: " + ", ".join(words) + ".") if words else "No task finished yet."


def _general_words(run: RunRecord) -> str:
    curves = "; ".join(curve.words() for curve in run.general)
    return f"Drift of general ability over the tasks, one panel a test: {curves}."


def _loss_words(run: RunRecord) -> str:
    words = []
    for term in run.loss_terms():
        series = run.loss_series(term)
        last = max(series)
        words.append(f"{long_label(term)} ends at {series[last][1][-1]:.3g} in task {last + 1}")
    return "Loss terms over optimizer steps: " + "; ".join(words) + "."


def _memory_words(run: RunRecord) -> str:
    total = sum(memory.bytes for memory in run.memories.values())
    return (
        f"Bars of the replay memory of {len(run.memories)} tasks, "
        f"{figures.byte_text(total)} together; the numbers are in the table below."
    )


def _head_words(heads: HeadImportance) -> str:
    n_layers, n_heads = heads.importance.shape
    text = f"Map of head importance, {n_layers} layers by {n_heads} heads"
    if heads.last_selected is None:
        return text + "."
    counts = heads.last_selected[1].sum(axis=1)
    chosen = ", ".join(f"layer {layer}: {count}" for layer, count in enumerate(counts) if count)
    return f"{text}; {counts.sum()} heads are selected ({chosen})."


def run_view(run: RunRecord, pictures: dict[str, Picture]) -> dict[str, Any]:
    """Everything the template shows of one run, formatted."""
    return {
        "run": run,
        "op": DASH if run.op is None else f"{100 * run.op:.2f}",
        "bwt": DASH if run.bwt is None else signed(100 * run.bwt),
        "seconds": DASH if run.seconds is None else duration(run.seconds),
        "pictures": pictures,
        "matrix": [[_percent(value) for value in row] for row in run.scores],
        "selected": _selection_words(run),
        "memories": [_memory_row(run, index) for index in sorted(run.memories)],
        "teachers": [
            {"number": index + 1, "task": run.tasks[index], **_teacher_cells(memory)}
            for index, memory in sorted(run.memories.items())
            if memory.has_teacher
        ],
        "answers": [entry for entry in _answers(run) if entry["lines"]],
        "recipe": list(_flatten(run.recipe)),
        "environment": list(_flatten({"versions": run.versions, "machine": run.machine})),
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if np.isfinite(value) else ""


def signed(value: float) -> str:
    """-1.5 -> '−1.50', 1.5 -> '+1.50'."""
    return f"{value:+.2f}".replace("-", "−")


def duration(seconds: float) -> str:
    """137.4 -> '2 min 17 s'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _selection_words(run: RunRecord) -> str | None:
    if run.heads is None or run.heads.last_selected is None:
        return None
    task, selected = run.heads.last_selected
    layers = int(selected.any(axis=1).sum())
    return (
        f"Outlined: the {int(selected.sum())} of {selected.size} heads, in {layers} of "
        f"{len(selected)} layers, that were selected after task {task + 1}, {run.tasks[task]}."
    )


def _memory_row(run: RunRecord, index: int) -> dict[str, str | int]:
    memory = run.memories[index]
    samples = max(memory.n_samples, 1)
    estimate = memory.estimated_bytes
    return {
        "number": index + 1,
        "task": run.tasks[index],
        "samples": memory.n_samples,
        "bytes": figures.byte_text(memory.bytes),
        "per_sample": figures.byte_text(memory.bytes / samples),
        "estimated": DASH if estimate is None else figures.byte_text(estimate / samples),
        "ratio": f"{memory.bytes / estimate:.2f}" if estimate else DASH,
    }


def _teacher_cells(memory: TaskMemory) -> dict[str, Any]:
    return {
        "loss": DASH if memory.teacher_loss is None else f"{memory.teacher_loss:.3f}",
        "entropy": DASH if memory.answer_entropy is None else f"{memory.answer_entropy:.3f}",
        "worth": {None: "not judged", True: "yes", False: "no"}[memory.worth_imitating],
        "warn": memory.worth_imitating is False,
    }


def _answers(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Per scored task a few answers, then and now, the most changed ones first."""
    for index in range(run.n_scored):
        now = read_predictions(run, after=run.n_scored - 1, on=index)
        then = read_predictions(run, after=index, on=index)
        pairs = list(zip(then, now, strict=False)) or [({}, line) for line in now]
        pairs.sort(key=lambda pair: -abs(_number(pair[0]) - _number(pair[1])))
        yield {
            "number": index + 1,
            "task": run.tasks[index],
            "is_last": index == run.n_scored - 1,
            "lines": [_answer_line(*pair) for pair in pairs[:ANSWERS_SHOWN]],
        }


def _answer_line(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {
        "prompt": _clip(now.get("prompt", ""), 160, 240),
        "answer": _clip(now.get("answer", ""), 200, 60),
        "then": _clip(then.get("prediction", DASH), 200, 60),
        "now": _clip(now.get("prediction", DASH), 200, 60),
        "scores": f"{_number(then):.2f} → {_number(now):.2f}" if then else f"{_number(now):.2f}",
    }


def _number(line: dict[str, Any]) -> float:
    score = line.get("score")
    return float(score) if isinstance(score, int | float) else 0.0


def _clip(value: Any, head: int, tail: int) -> str:
    """The beginning and the end of a long text: the question is often at the end of a prompt."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= head + tail + 3 else f"{text[:head]} … {text[-tail:]}"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix and value != {}:
        yield prefix, "null" if value is None else str(value)


def render(template: str, **content: Any) -> str:
    """A page from a file of templates/; every string in ``content`` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("seekr_peft.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(op_formula=OP_FORMULA, bwt_formula=BWT_FORMULA, **content)
    # A page may be looked at in a terminal, too. A tab is of the text.
    return printable(page.expandtabs(4))


def write_figures(folder: Path, pictures: dict[str, Picture], names: list[str]) -> None:
    """Write the pictures and remove those of ``names`` that an earlier report left and this one
    lacks.
    """
    for name in names:
        if name in pictures:
            replace_file(folder / f"{name}.png", pictures[name].png)
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of a page, and its folder; RunError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error}): give another place for it") from error
