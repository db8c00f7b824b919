"""Writes OUT/comparison.html of a comparison over variants, orders and seeds, and its figures.

The page is made like a run's: one file, figures inside, no script, every string escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..report import figures
from ..report.page import (
    DASH,
    Picture,
    duration,
    make_picture,
    matrix_words,
    render,
    replace_file,
    retention_words,
    signed,
    write_figures,
)
from ..report.reading import RunRecord, shorten
from . import figures as drawing
from .reading import Comparison, Difference, SingleRun, Spread, Variant, layer_shares, load_comparison, mean_record
from .results import PAGE_FILE

GAP_FORMULA = "gap closed = (OP − OP[baseline]) / (OP[multitask] − OP[baseline])"
SHOWN = 8
LABEL_LIMIT, VALUE_LIMIT = 120, 80
FIGURE_NAMES = ("op_bwt", "differences", "curve", "cost", "depth", "general")
ORDER_FIGURES = ("matrices_order", "retention_order")


@dataclass(frozen=True)
class Section:
    """A heading of the page with what is to be known about its pictures."""

    id: str
    title: str
    text: str
    pictures: list[Picture]


def write_comparison_page(out_directory: str | Path) -> Path:
    """Write OUT/comparison.html and OUT/figures/*.png from OUT/comparison.json and the runs it names.

    Returns the path of the page. Raises RunError naming the file when one is missing or broken.
    """
    comparison = load_comparison(out_directory)
    folder = comparison.path.parent
    sections = _sections(comparison)
    pictures = {picture.name: picture for section in sections for picture in section.pictures}
    earlier = [path.stem for name in ORDER_FIGURES for path in (folder / "figures").glob(f"{name}*.png")]
    html = render(
        "comparison.html.j2",
        comparison=comparison,
        gap_formula=GAP_FORMULA,
        rows=[_row(variant, comparison) for variant in comparison.variants],
        with_gap=any(variant.gap_closed is not None for variant in comparison.variants),
        missing=[variant for variant in comparison.variants if variant.n < variant.planned],
        sections=sections,
        runs=[_run_row(variant, run) for variant in comparison.variants for run in variant.runs],
    )
    write_figures(folder / "figures", pictures, list({*FIGURE_NAMES, *earlier, *pictures}))
    replace_file(folder / PAGE_FILE, html.encode("utf-8", errors="replace"))
    return folder / PAGE_FILE


def _row(variant: Variant, comparison: Comparison) -> dict[str, Any]:
    difference = variant.difference
    return {
        "label": shorten(variant.label, LABEL_LIMIT),
        "is_baseline": variant.label == comparison.baseline,
        "method": shorten(variant.method, LABEL_LIMIT),
        "settings": [_setting(*item) for item in variant.settings.items() if item[0] != "method.name"],
        "n": f"{variant.n} of {variant.planned}",
        "op": _spread(variant.op),
        "bwt": _spread(variant.bwt, sign=True),
        "learnt": _spread(variant.learnt),
        "difference": DASH if difference is None else _spread(difference.spread, sign=True),
        "wins": [] if difference is None else _wins(difference),
        "gap": DASH if variant.gap_closed is None else f"{100 * variant.gap_closed:.0f}".replace("-", "−"),
    }


def _setting(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{shorten(key, VALUE_LIMIT)} = {shorten(text, VALUE_LIMIT)}"


def _spread(spread: Spread | None, sign: bool = False) -> str:
    if spread is None:
        return DASH
    deviation = "" if spread.sd is None else f" ± {100 * spread.sd:.2f}"
    return _percent(spread.mean, sign) + deviation


def _percent(value: float | None, sign: bool = False) -> str:
    if value is None:
        return DASH
    return signed(100 * value) if sign else f"{100 * value:.2f}"


def _wins(difference: Difference) -> list[str]:
    words = [f"better in {difference.wins} of {difference.n}"]
    if difference.p is not None:
        words.append(f"p = {difference.p:.3f}" if difference.p >= 0.001 else "p < 0.001")
    return words


def _run_row(variant: Variant, run: SingleRun) -> dict[str, Any]:
    return {
        "label": shorten(variant.label, LABEL_LIMIT),
        "order": run.order,
        "seed": run.seed,
        "op": _percent(run.op),
        "bwt": _percent(run.bwt, sign=True),
        "learnt": _percent(run.learnt),
        "seconds": DASH if run.record.seconds is None else duration(run.record.seconds),
        "directory": run.directory,
    }


def _sections(comparison: Comparison) -> list[Section]:
    """Everything that can be drawn, in the page's order."""
    before = [section(comparison) for section in (_op_bwt, _differences, _curve)]
    after = [section(comparison) for section in (_cost, _depth, _general)]
    return [section for section in (*before, *_order_sections(comparison), *after) if section is not None]


def _op_bwt(comparison: Comparison) -> Section | None:
    return _section(
        "op_bwt",
        "Performance and forgetting",
        "OP against BWT. Small: every run; large: the variant's mean. A dashed line: a variant without BWT, which "
        "learns all tasks at once.",
        drawing.draw_op_bwt(comparison),
        f"OP over BWT, one marker a variant. {_score_words(comparison.finished)}",
    )


def _differences(comparison: Comparison) -> Section | None:
    return _section(
        "differences",
        "Differences to the baseline",
        "Every dot is one pair of runs with the same order and seed, the orders one under another; the bar and the "
        "number are the mean.",
        drawing.draw_differences(comparison),
        f"Paired differences of OP to the baseline. {_difference_words(comparison)}",
    )


def _curve(comparison: Comparison) -> Section | None:
    return _section(
        "curve",
        f"OP and BWT over {shorten(comparison.curve or '', VALUE_LIMIT)}",
        "Mean over the runs, the bars one standard deviation. Level lines: the baseline, and variants without a "
        "number there.",
        drawing.draw_curve(comparison),
        _curve_words(comparison),
    )


def _cost(comparison: Comparison) -> Section | None:
    return _section(
        "cost",
        "Cost",
        "Means over the runs, but for the milliseconds, which are those of the fastest run (other work on a machine "
        "only slows). The seconds outside of the steps and the bytes are those of all tasks of a run.",
        drawing.draw_cost(comparison),
        f"Bars of the cost of each variant. {_cost_words(comparison.finished)}",
    )


def _depth(comparison: Comparison) -> Section | None:
    choosing, cap = _first([variant for variant in comparison.finished if layer_shares(variant.records()) is not None])
    return _section(
        "depth",
        "Depth of the selected heads",
        f"Where the heads selected after the last task lie, mean over the runs.{cap}",
        drawing.draw_depth(choosing),
        f"Share of the selected heads in each layer. {_depth_words(choosing)}",
    )


def _general(comparison: Comparison) -> Section | None:
    measured, cap = _first(
        [variant for variant in comparison.finished if any(record.general for record in variant.records())]
    )
    means = {variant.name: mean_record(variant.records()) for variant in measured}
    return _section(
        "general",
        "General ability",
        "Tests that no task trains for, before the first task (0) and after each, mean over the runs of all orders. "
        f"Dashed: the base model.{cap}",
        figures.draw_general(means, [variant.place for variant in measured]),
        f"One panel a test of general ability. {_general_words(means)}",
    )


def _section(name: str, title: str, text: str, figure: Figure | None, alt: str) -> Section | None:
    return None if figure is None else Section(name, title, text, [make_picture(name, figure, alt)])


def _first(variants: list[Variant]) -> tuple[list[Variant], str]:
    """As many as one figure can show, and a sentence that says so where some are left out."""
    left_out = len(variants) > SHOWN
    return variants[:SHOWN], f" Shown are the first {SHOWN} of {len(variants)} variants." if left_out else ""


def _order_sections(comparison: Comparison) -> list[Section]:
    shown, cap = _first(comparison.finished)
    sections = []
    for order, tasks in enumerate(comparison.orders, 1):
        having = [variant for variant in shown if variant.records(order)]
        if not having:
            continue
        means = {variant.name: mean_record(variant.records(order)) for variant in having}
        matrices = make_picture(
            f"matrices_order{order}",
            figures.draw_matrices(means),
            f"Accuracy matrices of order {order} as heat maps on one colour scale. {_words(means, matrix_words)}",
        )
        retention = make_picture(
            f"retention_order{order}",
            figures.draw_retention(means, [variant.place for variant in having]),
            f"Order {order}, one panel a task, one line a variant: accuracy in percent after each later task. "
            f"{_words(means, retention_words)}",
        )
        text = (
            f"{', '.join(shorten(task, VALUE_LIMIT) for task in tasks)}. Score on each task (row) after each trained "
            f"task (column) in percent, and how it holds while later tasks are trained; means over the seeds.{cap}"
        )
        sections.append(Section(f"order{order}", f"Order {order}", text, [matrices, retention]))
    return sections


def _words(records: dict[str, RunRecord], words: Callable[[RunRecord], str]) -> str:
    return " ".join(f"{name}: {words(record)}" for name, record in records.items())


def _score_words(variants: list[Variant]) -> str:
    return "; ".join(
        f"{variant.name} OP {_spread(variant.op)} %, BWT {_spread(variant.bwt, sign=True)}" for variant in variants
    )


def _difference_words(comparison: Comparison) -> str:
    return "; ".join(
        f"{variant.name} {_spread(variant.difference.spread, sign=True)} points, {', '.join(_wins(variant.difference))}"
        for variant in comparison.finished
        if variant.difference is not None
    )


def _curve_words(comparison: Comparison) -> str:
    lines, levels = drawing.curve_lines(comparison)
    words = [
        f"{name} at {value:g}: OP {_spread(variant.op)} %, BWT {_spread(variant.bwt, sign=True)}"
        for name, points in lines.items()
        for value, variant in points
    ]
    return f"OP and BWT over the setting's value. {'; '.join(words)}. As levels: {_score_words(levels) or 'none'}."


def _cost_words(variants: list[Variant]) -> str:
    return "; ".join(
        f"{variant.name} "
        + ", ".join(
            f"{title} {drawing.cost_text(key, variant.costs[key])}" for key, title in drawing.COST_TITLES.items()
        )
        for variant in variants
        if variant.costs is not None
    )


def _depth_words(variants: list[Variant]) -> str:
    words = []
    for variant in variants:
        if (shares := layer_shares(variant.records())) is not None:
            layers = [f"layer {layer} {100 * shares[layer]:.0f} %" for layer in np.flatnonzero(shares)]
            words.append(f"{variant.name} {', '.join(layers)}")
    return "; ".join(words)


def _general_words(means: dict[str, RunRecord]) -> str:
    return " ".join(f"{name}: {', '.join(curve.words() for curve in mean.general)}." for name, mean in means.items())
