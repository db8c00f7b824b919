"""Draws the figures of a report with matplotlib's objects (no pyplot, no global state), and renders
them to PNG.

Every function takes records from ``reading`` and returns a ``Figure``, or None where the run has
nothing to draw. Colours: cividis for amounts, the Okabe-Ito palette for lines; both survive the
common kinds of colour blindness.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..loss_names import long_label
from .reading import GeneralCurve, HeadImportance, RunRecord, numbered_names, shorten

DOTS_PER_INCH = 160
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINE_STYLES = ("-", "--", "-.", ":")
TEXT, MUTED, GRID, NO_DATA = "#1f2328", "#57606a", "#d8dee4", "#eef0f2"
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "text.color": TEXT,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
}


@contextmanager
def report_style() -> Iterator[None]:
    """The report's own look, whatever style the caller's notebook has set; restored on exit."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A task name in a script the bundled font lacks is drawn as boxes; the page's tables have
        # it in full.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def look(position: int) -> dict[str, Any]:
    """Colour, marker and line of the run at this place in a list; colour and marker together come again after 49."""
    turn = position // len(OKABE_ITO)
    return {
        "color": OKABE_ITO[position % len(OKABE_ITO)],
        "marker": MARKERS[(position + turn) % len(MARKERS)],
        "linestyle": LINE_STYLES[turn % len(LINE_STYLES)],
    }


def legend_columns(labels: Collection[str], width: float) -> int:
    """How many columns of a legend with these labels fit into ``width`` inches."""
    return min(len(labels), max(1, int(width / (0.45 + 0.09 * max(map(len, labels))))))


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes at DOTS_PER_INCH."""
    buffer = io.BytesIO()
    with report_style():
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def draw_matrices(runs: dict[str, RunRecord]) -> Figure:
    """Accuracy matrices side by side on one colour scale (0-100 %), the numbers in the cells."""
    count = max(len(run.tasks) for run in runs.values())
    per_row = min(len(runs), 2 if count > 5 else 3)
    n_rows = math.ceil(len(runs) / per_row)
    # Several large matrices side by side leave room for whole percents only.
    digits, cell = (0, 0.36) if count > 5 and len(runs) > 1 else (1, 0.52 if count > 4 else 0.66)
    names = max(len(label) for run in runs.values() for label in numbered_names(run.tasks, 26))
    margin = 0.35 + 0.075 * names
    side = max(cell * count, 1.3)
    titles = [textwrap.fill(shorten(label, 40), max(int(side / 0.09), 12)) for label in runs]
    title_lines = max(title.count("\n") for title in titles)
    size = (max(per_row * side + margin + 1.1, 4.2), n_rows * (side * 0.86 + 0.75 + 0.16 * title_lines) + 0.3)
    with report_style():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(n_rows, per_row, squeeze=False)
        scale = Normalize(0, 100)
        colours = matplotlib.colormaps["cividis"].with_extremes(bad=NO_DATA)
        for position, axes in enumerate(grid.flat):
            if position >= len(runs):
                axes.set_axis_off()
                continue
            run = list(runs.values())[position]
            _draw_matrix(axes, run, colours, scale, digits, position % per_row == 0)
            axes.set_title(titles[position] if len(runs) > 1 else "")
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=grid, shrink=0.9, pad=0.02, aspect=20 * n_rows)
        bar.set_label("accuracy (%)")
        bar.outline.set_visible(False)
    return figure


def _draw_matrix(axes: Axes, run: RunRecord, colours: Colormap, scale: Normalize, digits: int, name_rows: bool) -> None:
    percent = 100 * run.scores
    count = len(run.tasks)
    axes.imshow(np.ma.masked_invalid(percent), cmap=colours, norm=scale, aspect="auto")
    for i, j in np.argwhere(np.isfinite(percent)):
        colour = _readable_on(colours(scale(percent[i, j])))
        axes.text(j, i, f"{percent[i, j]:.{digits}f}", ha="center", va="center", color=colour, size=8)
    axes.set_xticks(range(count), [str(j + 1) for j in range(count)])
    axes.set_yticks(range(count), numbered_names(run.tasks, 26) if name_rows else [""] * count)
    axes.set_xlabel("after training task")
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever has the higher contrast on an RGBA colour (WCAG relative
    luminance).
    """
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def draw_retention(runs: dict[str, RunRecord], places: Sequence[int] | None = None) -> Figure:
    """One panel a task, one line a run: accuracy (%) of the task after each later one.

    ``places`` gives each run the look of its place in a longer list.
    """
    places = places or range(len(runs))
    tasks = next(iter(runs.values())).tasks
    count = len(tasks)
    per_row = min(count, 4 if count != 6 else 3)
    n_rows = math.ceil(count / per_row)
    width = max(2.35 * per_row + 0.4, 4.2)
    labels = [shorten(label, 30) for label in runs]
    columns = legend_columns(labels, width)
    size = (width, 1.9 * n_rows + (0.57 + 0.18 * math.ceil(len(runs) / columns) if len(runs) > 1 else 0.3))
    with report_style():
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06))
        grid = figure.subplots(n_rows, per_row, squeeze=False, sharex=True, sharey=True)
        for position, axes in enumerate(grid.flat):
            if position >= count:
                axes.set_axis_off()
                continue
            _draw_task_curves(axes, runs, position, places)
            axes.set_title(shorten(f"{position + 1} {tasks[position]}", 26), loc="left")
            # The last panel of every column carries the tick labels, also above an unused place.
            axes.tick_params(labelbottom=position + per_row >= count)
        figure.supxlabel("after training task", size=9)
        figure.supylabel("accuracy (%)", size=9)
        if len(runs) > 1:
            handles, _ = grid.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


def _draw_task_curves(axes: Axes, runs: dict[str, RunRecord], task: int, places: Sequence[int]) -> None:
    count = len(next(iter(runs.values())).tasks)
    smallest = 4.5 if count <= 6 else 3.2
    for position, (label, run) in enumerate(runs.items()):
        after = np.flatnonzero(np.isfinite(run.scores[task]))
        axes.plot(
            after + 1,
            100 * run.scores[task, after],
            **look(places[position]),
            # The first runs have the larger markers, so that equal points do not hide one another.
            markersize=smallest + 0.35 * smallest * max(min(len(runs), 4) - 1 - position, 0),
            linewidth=1.6,
            label=label,
            # A marker at 0 or 100 % stays whole; an empty unclipped line would break the layout.
            clip_on=not after.size,
            zorder=3,
        )
    axes.set_xlim(0.6, count + 0.4)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.tick_params(length=2)


def draw_general(runs: dict[str, RunRecord], places: Sequence[int] | None = None) -> Figure | None:
    """One panel a test of general ability, one line a run: its value before the first task (0) and after each.

    The first value of the first run that has one is dashed. ``places`` as in draw_retention.
    """
    places = places or range(len(runs))
    measured = [
        {curve.name: curve for curve in run.general if np.isfinite(curve.values).any()} for run in runs.values()
    ]
    names = list(dict.fromkeys(name for curves in measured for name in curves))
    if not names:
        return None
    per_row = min(len(names), 3)
    n_rows = math.ceil(len(names) / per_row)
    width = 3.2 * per_row + 0.6
    labels = [shorten(label, 30) for label in runs]
    columns = legend_columns(labels, width)
    legend = 0.2 * math.ceil(len(runs) / columns) + 0.1 if len(runs) > 1 else 0
    with report_style():
        figure = Figure(figsize=(width, 2.3 * n_rows + 0.3 + legend), layout=ConstrainedLayoutEngine(wspace=0.06))
        grid = figure.subplots(n_rows, per_row, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        lines: dict[int, Any] = {}
        for axes, name in zip(grid.flat, names, strict=False):
            drawn = {place: curves[name] for place, curves in zip(places, measured, strict=True) if name in curves}
            lines |= _draw_general_test(axes, drawn)
            axes.set_title(shorten(name, 36), loc="left")
            axes.set_xlim(-0.4, max(len(run.tasks) for run in runs.values()) + 0.4)
        figure.supxlabel("after training task (0: before the first)", size=9)
        if len(runs) > 1:
            named = {label: lines[place] for place, label in zip(places, labels, strict=True) if place in lines}
            figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns)
    return figure


def _draw_general_test(axes: Axes, curves: dict[int, GeneralCurve]) -> dict[int, Any]:
    """One panel, the looks of its curves by their place; place -> line."""
    base = next((curve.shown[0] for curve in curves.values() if np.isfinite(curve.values[0])), None)
    if base is not None:
        axes.axhline(base, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    lines = {}
    for place, curve in curves.items():
        after = np.flatnonzero(np.isfinite(curve.values))
        (lines[place],) = axes.plot(after, curve.shown[after], markersize=4.5, linewidth=1.6, **look(place))
    kind = next(iter(curves.values())).kind
    # A change that chance explains shall not fill the panel.
    low, high = axes.get_ylim()
    spare = max((0.2 if kind == "text" else 20) - (high - low), 0) / 2
    axes.set_ylim(low - spare, high + spare)
    axes.set_ylabel("nats per token" if kind == "text" else "right (%)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.tick_params(length=2)
    return lines


def draw_heads(heads: HeadImportance) -> Figure | None:
    """Layers x heads, importance relative to the largest on a log scale, the selected heads
    outlined.
    """
    largest = np.nanmax(heads.importance, initial=0.0)
    if not np.isfinite(largest) or largest <= 0:
        return None
    relative = np.ma.masked_invalid(heads.importance / largest)
    smallest = relative[relative > 0].min()
    # Heads of no importance at all, and below a ten-thousandth, share the darkest colour.
    scale = LogNorm(min(max(float(smallest), 1e-4), 0.5), 1.0, clip=True)
    n_layers, n_heads = relative.shape
    cell = min(0.5, 8.6 / n_heads)
    size = (max(cell * n_heads + 1.7, 4.4), max(cell * n_layers * 0.8 + 0.8, 2.4))
    with report_style():
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="white")
        shown = np.ma.where(relative == 0, scale.vmin, relative)
        image = axes.imshow(shown, cmap=colours, norm=scale, aspect="auto", interpolation="none")
        if heads.last_selected is not None:
            _outline(axes, heads.last_selected[1])
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        for axis, length in ((axes.xaxis, n_heads), (axes.yaxis, n_layers)):
            axis.set_ticks(range(0, length, 1 if length <= 16 else 4))
        axes.tick_params(length=2)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("relative importance (log)")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter("")
        bar.outline.set_visible(False)
    return figure


def _outline(axes: Axes, selected: np.ndarray) -> None:
    """A box just inside each selected cell: white under black, so it shows on every colour of the
    map.
    """
    inset = 0.08
    boxes = [
        Rectangle((head - 0.5 + inset, layer - 0.5 + inset), 1 - 2 * inset, 1 - 2 * inset)
        for layer, head in np.argwhere(selected)
    ]
    for colour, width in (("white", 3.0), ("black", 1.3)):
        axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=colour, linewidth=width))


def draw_losses(run: RunRecord) -> Figure | None:
    """One panel a loss term over the optimizer steps of the whole sequence, tasks marked."""
    series = {term: run.loss_series(term) for term in run.loss_terms()}
    if not series:
        return None
    starts = run.task_starts()
    with report_style():
        figure = Figure(figsize=(9.6, 1.55 * len(series) + 0.7), layout="constrained")
        panels = figure.subplots(len(series), 1, squeeze=False, sharex=True)[:, 0]
        for place, (axes, term) in enumerate(zip(panels, series, strict=True)):
            colour = OKABE_ITO[place % len(OKABE_ITO)]
            for steps, values in series[term].values():
                _draw_loss(axes, steps, values, colour)
            _scale_loss(axes, np.concatenate([values for _, values in series[term].values()]))
            scale = " (log)" if axes.get_yscale() == "log" else ""
            axes.set_ylabel(long_label(term) + scale)
            for start in sorted({*starts} - {0, starts[-1]}):
                axes.axvline(start, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
        _name_task_spans(panels[0], run, starts)
        panels[-1].set_xlim(0, max(starts[-1], 1))
        panels[-1].set_xlabel("optimizer steps over the whole sequence")
        panels[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        figure.align_ylabels()
    return figure


def _draw_loss(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One task's values; a long series is drawn faintly under its running mean."""
    if len(values) < 20:
        axes.plot(steps, values, color=colour, linewidth=1.4, marker=".", markersize=4)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, running_mean(values, max(len(values) // 15, 3)), color=colour, linewidth=1.7)


def _scale_loss(axes: Axes, values: np.ndarray) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == values.size and positive.max() > 50 * positive.min():
        axes.set_yscale("log")
        # The default labels are math text, which is switched off: a task may be called "$5 and
        # $10".
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter("")
    elif positive.size:
        axes.set_ylim(bottom=min(0.0, float(np.nanmin(values[np.isfinite(values)]))))
    axes.grid(axis="y")
    axes.tick_params(length=2)


def _name_task_spans(axes: Axes, run: RunRecord, starts: list[int]) -> None:
    """Task names above the top panel, each cut to the width of its own span."""
    for index, name in enumerate(run.stages()):
        share = (starts[index + 1] - starts[index]) / max(starts[-1], 1)
        if share > 0:
            label = shorten(f"{index + 1} {name}", int(share * 100))
            label = label if share > 0.05 else str(index + 1)
            middle = (starts[index] + starts[index + 1]) / 2
            transform = axes.get_xaxis_transform()
            axes.text(middle, 1.04, label, transform=transform, ha="center", va="bottom", size=8.5)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window that is cut at the ends; NaNs are left out of each mean."""
    half = window // 2
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    inside = count[high] - count[low]
    means = (total[high] - total[low]) / np.maximum(inside, 1)
    return np.where(inside > 0, means, np.nan)


def byte_text(count: float) -> str:
    """1234567 -> '1.23 MB' (decimal units, three significant digits)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable: GB always returns")


def draw_memory(run: RunRecord) -> Figure | None:
    """One bar a task: bytes on disk, with a tick where the estimate was."""
    if not run.memories:
        return None
    indices = sorted(run.memories)
    sizes = [run.memories[index].bytes for index in indices]
    estimates = [run.memories[index].estimated_bytes for index in indices]
    largest = max([*sizes, *(estimate or 0 for estimate in estimates), 1])
    labels = numbered_names(run.tasks, 26)
    with report_style():
        figure = Figure(figsize=(7.6, 0.34 * len(indices) + 1.1), layout="constrained")
        axes = figure.subplots()
        rows = range(len(indices))
        axes.barh(rows, sizes, height=0.62, color=OKABE_ITO[5], label="on disk")
        for row, size, estimate in zip(rows, sizes, estimates, strict=True):
            if estimate is not None:
                span = (row - 0.42, row + 0.42)
                axes.plot([estimate] * 2, span, color=OKABE_ITO[1], linewidth=2.2, label="estimate")
            end = max(size, estimate or 0) + 0.015 * largest
            axes.text(end, row, byte_text(size), va="center", size=8.5)
        axes.set_yticks(rows, [labels[index] for index in indices])
        axes.set_xlim(0, largest * 1.2)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_text(value)))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside upper right", ncols=2)
    return figure
