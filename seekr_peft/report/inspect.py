"""What ``seekr-peft inspect RUN`` prints: the state of a run directory in a terminal.

Text from files is put into ``Text``, never parsed as rich's markup.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .reading import RunRecord, numbered_names, read_run

DASH = "–"
NAME_LIMIT = 28


def render_inspection(run_directory: str | Path, console: Console) -> None:
    """Print state, tasks with teacher and memory, selected heads, the matrix with OP and BWT, and general ability.

    Raises RunError when the directory is not a run directory or a file in it is broken.
    """
    run = read_run(run_directory)
    console.print(_state(run))
    _print_table(console, "Tasks", tasks_table(run))
    for index, memory in sorted(run.memories.items()):
        if memory.worth_imitating is False:
            name = f"{index + 1} {run.tasks[index]}"
            console.print(Text(f"Warning: the teacher of {name} is not worth imitating.", "yellow"))
    selection = selection_table(run)
    if selection is None:
        console.print(Text("\nNo heads selected.", "dim"))
    else:
        _print_table(console, "Selected heads per layer, a column per task", selection)
    title = "Accuracy (%) on each task, after training task ..."
    _print_table(console, title, matrix_table(run))
    console.print(_scores(run))
    if run.general:
        console.print(Text("\nGeneral ability, at first (before the first task) and after the last one", "bold"))
    for curve in run.general:
        console.print(Text(curve.words()))


def _state(run: RunRecord) -> Text:
    text = Text()
    text.append(str(run.directory), style="bold")
    text.append(f"\n{run.method}, {run.status}: ")
    text.append(f"{run.n_finished} of {len(run.tasks)} tasks finished")
    if run.seconds is not None:
        text.append(f", {run.seconds:.1f} s")
    return text


def tasks_table(run: RunRecord) -> Table:
    """One row a task: finished or not, replay samples, bytes, teacher's loss and answer entropy
    (nats).
    """
    table = _table()
    table.add_column("task", overflow="ellipsis", no_wrap=True)
    table.add_column("state")
    for heading in ("samples", "memory", "teacher loss", "entropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, name in enumerate(numbered_names(run.tasks, NAME_LIMIT)):
        memory = run.memories.get(index)
        table.add_row(
            Text(name),
            "finished" if index < run.n_finished else "open",
            DASH if memory is None else str(memory.n_samples),
            DASH if memory is None else f"{memory.bytes / 1000:.1f} kB",
            _nats(memory.teacher_loss if memory else None),
            _nats(memory.answer_entropy if memory else None),
        )
    return table


def selection_table(run: RunRecord) -> Table | None:
    """Selected heads per layer (rows) as counts, one column a task; None when no task has a
    selection.
    """
    counts = selected_counts(run)
    if not counts:
        return None
    table = _table()
    table.add_column("layer", justify="right")
    for index in counts:
        table.add_column(str(index + 1), justify="right")
    for layer in sorted({layer for column in counts.values() for layer in column}):
        cells = [str(column.get(layer, 0) or "·") for column in counts.values()]
        table.add_row(str(layer), *cells)
    table.add_section()
    table.add_row("all", *(str(sum(column.values())) for column in counts.values()))
    return table


def selected_counts(run: RunRecord) -> dict[int, dict[int, int]]:
    """Task index -> layer -> number of selected heads, from memory.json or else
    importance.safetensors.
    """
    counts: dict[int, dict[int, int]] = {}
    for index in range(len(run.tasks)):
        memory = run.memories.get(index)
        if memory is not None and memory.selection:
            counts[index] = {layer: len(heads) for layer, heads in memory.selection.items()}
        elif run.heads is not None and index in run.heads.selected:
            per_layer = run.heads.selected[index].sum(axis=1)
            counts[index] = {layer: int(count) for layer, count in enumerate(per_layer) if count}
    return counts


def matrix_table(run: RunRecord) -> Table:
    """The accuracy matrix in percent; whole percents when there are more than eight tasks."""
    digits = 1 if len(run.tasks) <= 8 else 0
    table = _table()
    table.add_column("task", overflow="ellipsis", no_wrap=True)
    for number in range(1, len(run.tasks) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    names = numbered_names(run.tasks, NAME_LIMIT)
    for name, row in zip(names, 100 * run.scores, strict=True):
        cells = [f"{value:.{digits}f}" if np.isfinite(value) else "" for value in row]
        table.add_row(Text(name), *cells)
    return table


def _print_table(console: Console, title: str, table: Table) -> None:
    # Not the table's own title: rich would wrap that to the width of a narrow table.
    console.print(Text(f"\n{title}", "bold"))
    console.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _nats(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _scores(run: RunRecord) -> Text:
    op = DASH if run.op is None else f"{100 * run.op:.2f} %"
    bwt = DASH if run.bwt is None else f"{100 * run.bwt:+.2f} % points"
    text = Text()
    text.append(f"OP {op}", style="bold")
    text.append("  mean of the last column\n", style="dim")
    text.append(f"BWT {bwt}", style="bold")
    text.append("  1/(K-1) * sum over i<K of (a[i,K] - a[i,i])", style="dim")
    if run.n_scored < len(run.tasks):
        text.append(f"\nover the {run.n_scored} finished of {len(run.tasks)} tasks", style="dim")
    return text
