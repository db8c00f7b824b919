"""Draws the figures of a comparison of variants over orders and seeds: one look a variant in all of them.

Scores come out in percent and their differences in percentage points. Every function returns a ``Figure``, or None
where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ..report.figures import GRID, MUTED, byte_text, legend_columns, look, report_style
from ..report.reading import shorten
from .reading import Comparison, Spread, Variant, distinct_names, layer_shares

CURVE_LABEL_LIMIT = 45
COST_TITLES = {
    "step_seconds": "step (ms)",
    "step_peak_bytes": "peak memory of a step",
    "other_seconds": "outside of the steps (s)",
    "kept_bytes": "kept on disk",
}


def draw_op_bwt(comparison: Comparison) -> Figure | None:
    """OP over BWT: a small marker a run, a large one the variant's mean; a line where a variant has no BWT."""
    variants = comparison.finished
    if not any(variant.bwt for variant in variants):
        return None
    with report_style():
        figure = Figure(figsize=(8.8, max(4.4, 0.21 * len(variants) + 0.6)), layout="constrained")
        axes = figure.subplots()
        for variant in variants:
            style = look(variant.place)
            if variant.op and variant.bwt:
                known = [(100 * run.bwt, 100 * run.op) for run in variant.runs if run.bwt is not None]
                dots = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
                axes.plot(*np.array(known).reshape(-1, 2).T, **dots, markersize=3.5, alpha=0.45, markeredgewidth=0)
                mean = ([100 * variant.bwt.mean], [100 * variant.op.mean])
                axes.plot(*mean, **dots, markersize=9, markeredgecolor="white", label=variant.name, zorder=3)
            elif variant.op:
                _level(axes, variant, variant.op)
        axes.set_xlabel("BWT (percentage points)")
        axes.set_ylabel("OP (%)")
        axes.grid()
        axes.tick_params(length=2)
        figure.legend(loc="outside right upper")
    return figure


def _level(axes: Axes, variant: Variant, spread: Spread) -> None:
    """A horizontal line with the colour of a variant that is no point of the figure."""
    style = look(variant.place)
    # A line without a marker needs another style than the lines that join points.
    dashes = [(0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))][variant.place // 7 % 3]
    axes.axhline(100 * spread.mean, color=style["color"], linestyle=dashes, linewidth=1.4, label=variant.name)


def draw_differences(comparison: Comparison) -> Figure | None:
    """Per variant a row: the difference of OP to the baseline in each (order, seed) pair, and the mean in numbers."""
    rows = [(v, v.difference, comparison.pairs(v)) for v in comparison.finished if v.label != comparison.baseline]
    rows = [(variant, difference, pairs) for variant, difference, pairs in rows if pairs]
    if max((len(pairs) for _, _, pairs in rows), default=0) < 2:
        return None
    count = len(comparison.orders)
    dots: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 3}
    with report_style():
        figure = Figure(figsize=(7.6, 0.42 * len(rows) + 1.0), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=1.1)
        for row, (variant, difference, pairs) in enumerate(rows):
            style = look(variant.place)
            # The orders lie one under another, so that equal differences do not hide one another.
            heights = [row + 0.5 * ((order - 0.5) / count - 0.5) for order, _ in pairs]
            points = [100 * value for value in pairs.values()]
            axes.plot(points, heights, color=style["color"], marker="o", linestyle="", **dots)
            if difference is not None:
                mean = 100 * difference.spread.mean
                axes.plot([mean] * 2, [row - 0.36, row + 0.36], color=style["color"], linewidth=3, alpha=0.6)
                words = f"{mean:+.2f}".replace("-", "−")
                axes.text(1.01, row, words, transform=axes.get_yaxis_transform(), va="center", size=8.5)
        axes.set_yticks(range(len(rows)), [variant.name for variant, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"OP above {shorten(comparison.baseline or '', 40)} (percentage points)")
        axes.grid(axis="x")
        axes.tick_params(length=2)
        axes.tick_params(axis="y", length=0)
    return figure


def curve_lines(comparison: Comparison) -> tuple[dict[str, list[tuple[float, Variant]]], list[Variant]]:
    """(label -> points (value of the setting, variant) in their order, the variants that are levels instead).

    Variants that differ in more than the setting make lines of their own. A level: no such value, or the baseline.
    """
    setting = comparison.curve
    groups: dict[tuple[str, str], list[tuple[float, Variant]]] = {}
    levels = []
    for variant in comparison.finished:
        value = variant.settings.get(setting) if setting else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            levels.append(variant)
        else:
            others = {key: value for key, value in variant.settings.items() if key not in (setting, "method.name")}
            words = ", ".join(f"{key}={value}" for key, value in others.items())
            groups.setdefault((variant.method, words), []).append((float(value), variant))
            if variant.label == comparison.baseline:
                levels.append(variant)
    methods = [method for method, _ in groups]
    labels = [f"{method}, {words}" if words and methods.count(method) > 1 else method for method, words in groups]
    names = distinct_names(labels, CURVE_LABEL_LIMIT)
    lines = {
        name: sorted(points, key=lambda point: point[0]) for name, points in zip(names, groups.values(), strict=True)
    }
    return lines, levels


def draw_curve(comparison: Comparison) -> Figure | None:
    """OP and BWT over the value of the setting ``curve``, the standard deviation as bars; other variants as levels."""
    lines, levels = curve_lines(comparison)
    if not lines:
        return None
    values = sorted({value for points in lines.values() for value, _ in points})
    with report_style():
        labels = [*lines, *(variant.name for variant in levels)]
        columns = legend_columns(labels, 9.8)
        figure = Figure(figsize=(9.8, 3.4 + 0.2 * math.ceil(len(labels) / columns)), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, score, title in zip(panels, ("op", "bwt"), ("OP (%)", "BWT (percentage points)"), strict=True):
            for name, points in lines.items():
                known = [(value, spread) for value, v in points if (spread := getattr(v, score)) is not None]
                _draw_spreads(axes, known, {**look(points[0][1].place), "label": name})
            for variant in levels:
                if (spread := getattr(variant, score)) is not None:
                    _level(axes, variant, spread)
            axes.set_xlabel(shorten(comparison.curve or "", 50))
            axes.set_ylabel(title)
            _scale_values(axes, values)
            axes.grid(axis="y")
            axes.tick_params(length=2)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


def _draw_spreads(axes: Axes, points: Sequence[tuple[float, Spread]], style: dict[str, Any]) -> None:
    means = [100 * spread.mean for _, spread in points]
    bars = [100 * (spread.sd or 0.0) for _, spread in points]
    axes.errorbar([value for value, _ in points], means, yerr=bars, **style, markersize=5.5, capsize=3, linewidth=1.6)


def _scale_values(axes: Axes, values: list[float]) -> None:
    """A log axis where the values span more than a factor of 8; ticks at the values themselves, when they are few."""
    log = values[0] > 0 and values[-1] > 8 * values[0]
    axes.set_xscale("log" if log else "linear")
    if log or len(values) <= 8:
        # The labels of a log axis are math text, which is switched off.
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())


def draw_cost(comparison: Comparison) -> Figure | None:
    """Bars per variant: milliseconds a step, peak memory of a step, seconds outside of the steps, bytes kept."""
    variants = [variant for variant in comparison.finished if variant.costs]
    if not variants:
        return None
    rows = range(len(variants))
    with report_style():
        figure = Figure(figsize=(9.8, 0.3 * len(variants) + 0.7), layout="constrained")
        panels = figure.subplots(1, len(COST_TITLES), sharey=True)
        for axes, (key, title) in zip(panels, COST_TITLES.items(), strict=True):
            values = [(variant.costs or {})[key] for variant in variants]
            known = [value or 0.0 for value in values]
            colours = [look(variant.place)["color"] for variant in variants]
            axes.barh(rows, known, height=0.62, color=colours)
            largest = max(known) or 1.0
            for row, value in zip(rows, values, strict=True):
                axes.text((value or 0.0) + 0.03 * largest, row, cost_text(key, value), va="center", size=8.5)
            axes.set_xlim(0, 1.5 * largest)
            axes.set_title(title, loc="left")
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.spines["left"].set_color(GRID)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(rows, [variant.name for variant in variants])
        panels[0].invert_yaxis()
    return figure


def cost_text(key: str, value: float | None) -> str:
    """A cost with its unit; a dash where it was not measured."""
    if value is None:
        return "–"
    if key == "step_seconds":
        return f"{1000 * value:.1f} ms"
    return f"{value:.1f} s" if key.endswith("_seconds") else byte_text(value)


def draw_depth(variants: Iterable[Variant]) -> Figure | None:
    """One line a variant: the share of the selected heads in each layer after the last task, mean over the runs.

    Over the relative depth (0: first layer, 1: last) where the models differ in layers.
    """
    found = [(variant, shares) for variant in variants if (shares := layer_shares(variant.records())) is not None]
    if not found:
        return None
    relative = len({len(shares) for _, shares in found}) > 1
    with report_style():
        figure = Figure(figsize=(8.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for variant, shares in found:
            layers = np.arange(len(shares)) / max(len(shares) - 1, 1) if relative else np.arange(len(shares))
            axes.plot(layers, 100 * shares, **look(variant.place), markersize=5, linewidth=1.6, label=variant.name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("relative depth (0: first layer, 1: last)" if relative else "layer")
        axes.set_ylabel("share of the selected heads (%)")
        if not relative:
            axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.tick_params(length=2)
        figure.legend(loc="outside right upper")
    return figure
