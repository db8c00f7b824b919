"""What the finished runs say together: ``Comparison``, its table and its files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..evaluation import FORMULAS, AccuracyMatrix
from ..evaluation.matrix import JSON_NAME
from ..files.atomic import write_json, write_text
from ..files.manifest import StoredFiles
from ..methods import get_method
from ..run.directory import is_finished
from ..run.task_costs import COSTS_FILE, read_costs
from .answer import answer
from .checks import FinishedRun, check_comparable, what_is_the_same
from .plan import Job, Plan, Variant
from .statistics import TEST_ASSUMPTION, TEST_NAME, PairedDifference, Spread, p_words

if TYPE_CHECKING:
    from rich.table import Table

JSON_FILE, TABLE_FILE, CSV_FILE, RUNS_FILE = "comparison.json", "comparison.md", "comparison.csv", "runs.csv"
PAGE_FILE = "comparison.html"
GAP_FORMULA = "gap closed = (OP - OP[baseline]) / (OP[multitask] - OP[baseline])"
SMALLEST_GAP = 0.01
"""Of OP: below a point there is no gap to speak of."""

_NOT_IN_THE_TERMINAL = ("learnt", "wins", "MB a step", "kept kB")
_COSTS = ("n_steps", "train_seconds", "other_seconds", "evaluate_seconds", "kept_bytes")


@dataclass(frozen=True)
class RunFigures:
    """One finished run: scores are fractions; ``bwt`` and ``learnt`` (mean score of each task right after its own
    training) are None where all tasks are trained at once. ``cost`` sums over the run's tasks, but for the peak of a
    step, which is the largest."""

    variant: str
    order: int
    seed: int
    directory: str
    op: float
    bwt: float | None
    learnt: float | None
    cost: dict[str, float]

    @property
    def pair(self) -> tuple[int, int]:
        """What it shares with the runs of the other variants."""
        return self.order, self.seed


@dataclass(frozen=True)
class VariantFigures:
    """All finished runs of a variant together; ``n`` of ``planned``. Figures are None where there are none."""

    label: str
    method: str
    settings: dict[str, Any]
    n: int
    planned: int
    op: Spread | None
    bwt: Spread | None
    learnt: Spread | None
    cost: dict[str, float] | None
    against_baseline: PairedDifference | None
    gap_closed: float | None


@dataclass(frozen=True)
class Comparison:
    """The whole result; ``to_dict`` is comparison.json."""

    title: str
    command: str
    subject: str | None
    baseline: str | None
    curve: str | None
    orders: list[list[str]]
    seeds: list[int]
    same: list[str]
    variants: list[VariantFigures]
    runs: list[RunFigures]

    def variant(self, label: str) -> VariantFigures:
        """The figures of one variant; KeyError when there is none."""
        found = {variant.label: variant for variant in self.variants}
        return found[label]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "answer": self.answer(),
            "test": {"name": TEST_NAME, "assumption": TEST_ASSUMPTION},
            "formulas": {"op": FORMULAS["op"], "bwt": FORMULAS["bwt"], "gap_closed": GAP_FORMULA},
        }

    def answer(self) -> str:
        """Whether the recipe's own method is worth it, in words; empty without a baseline beside it."""
        if self.subject is None or self.baseline is None:
            return ""
        subject, baseline = self.variant(self.subject), self.variant(self.baseline)
        if subject.against_baseline is None:
            return ""
        cost, base = subject.cost, baseline.cost
        return answer(
            subject.label,
            baseline.label,
            subject.against_baseline,
            subject.gap_closed,
            self._step_ratio(subject.label, baseline.label),
            cost["kept_bytes"] - base["kept_bytes"] if cost and base else None,
        )

    def _step_ratio(self, label: str, baseline: str) -> float | None:
        """Of the fastest runs of either, over the orders and seeds that both have."""
        timed = [run for run in self.runs if run.cost["step_seconds"]]
        own, base = ({run.pair: run for run in timed if run.variant == name} for name in (label, baseline))
        common = own.keys() & base.keys()
        if not common:
            return None
        return _fastest([own[pair] for pair in common]) / _fastest([base[pair] for pair in common])

    def test_sentence(self) -> str:
        """What the column p means."""
        return f"p: {TEST_NAME} of OP against {self.baseline}; {TEST_ASSUMPTION}." if self.baseline else ""

    def rows(self) -> list[dict[str, str]]:
        """The table, a row a variant, as text; scores in percent."""
        return [self._row(variant) for variant in self.variants]

    def to_markdown(self) -> str:
        """Title, table, and what its columns mean."""
        rows = self.rows()
        names = list(rows[0])
        rule = ["---" if name == "variant" else "---:" for name in names]
        cells = [names, rule, *([row[name] for name in names] for row in rows)]
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in cells]
        seeds, orders = ", ".join(map(str, self.seeds)), len(self.orders)
        notes = [
            f"Scores in %, mean ± standard deviation over n runs (seeds {seeds}; {orders} order{'s' * (orders > 1)}).",
            f"{FORMULAS['op']}. {FORMULAS['bwt']}. learnt: mean score of each task right after its own training.",
            *([f"{GAP_FORMULA}, of the means."] if "gap closed" in names else []),
            *([self.test_sentence()] if self.baseline else []),
            "ms a step: of the fastest run, since other work on a machine only slows; MB, kB: means.",
            f"The same for all: {'; '.join(self.same)}.",
        ]
        answered = [self.answer(), ""] if self.answer() else []
        return printable(
            "\n".join([f"# {self.title}", "", *answered, *lines, "", *notes, "", f"    {self.command}", ""])
        )

    def to_rich_table(self) -> Table:
        """The table for the terminal, with fewer columns."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = self.rows()
        names = [name for name in rows[0] if name not in _NOT_IN_THE_TERMINAL]
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in names:
            table.add_column(
                name, justify="left" if name == "variant" else "right", no_wrap=name != "variant", min_width=len(name)
            )
        for row in rows:
            table.add_row(*(Text(row[name]) for name in names))
        return table

    def _row(self, variant: VariantFigures) -> dict[str, str]:
        row = {
            "variant": variant.label,
            "n": f"{variant.n}" if variant.n == variant.planned else f"{variant.n}/{variant.planned}",
        }
        row |= {
            "OP": _percent(variant.op),
            "BWT": _percent(variant.bwt, signed=True),
            "learnt": _percent(variant.learnt),
        }
        if self.baseline:
            difference = variant.against_baseline
            row[f"OP - {self.baseline}"] = _percent(difference, signed=True)
            row["wins"] = f"{difference.wins}/{difference.n}" if difference else ""
            row["p"] = p_words(difference.p) if difference and difference.p is not None else ""
        if any(other.gap_closed is not None for other in self.variants):
            row["gap closed"] = "" if variant.gap_closed is None else f"{100 * variant.gap_closed:.0f} %"
        cost = variant.cost
        row["ms a step"] = f"{1000 * cost['step_seconds']:.0f}" if cost else ""
        row["MB a step"] = f"{cost['step_peak_bytes'] / 1e6:.1f}" if cost and cost["step_peak_bytes"] else ""
        row["kept kB"] = f"{cost['kept_bytes'] / 1e3:.0f}" if cost else ""
        return row


def read_comparison(plan: Plan, command: str = "") -> Comparison:
    """Gather the finished runs of ``plan``; RunError when two of one order and seed are not comparable."""
    finished = [job for job in plan.jobs if is_finished(job.directory)]
    check_comparable([FinishedRun(job.variant, job.order, job.seed, job.directory) for job in finished])
    runs = [_run_figures(job, plan.directory) for job in finished]
    return Comparison(
        title=plan.recipe.compare.title or "Methods side by side",
        command=command,
        subject=_subject(plan),
        baseline=plan.baseline,
        curve=plan.recipe.compare.curve,
        # By the names that the tasks have in their runs: without the FORMAT/ of mixed tasks.
        orders=[[name.rpartition("/")[2] for name in order] for order in plan.orders],
        seeds=plan.seeds,
        same=what_is_the_same(plan.variants),
        variants=[_variant_figures(variant, plan, runs) for variant in plan.variants],
        runs=runs,
    )


def write_comparison_files(comparison: Comparison, directory: Path) -> None:
    """comparison.json, comparison.md, comparison.csv (a row a variant) and runs.csv (a row a run)."""
    write_json(directory / JSON_FILE, comparison.to_dict())
    write_text(directory / TABLE_FILE, comparison.to_markdown())
    write_text(directory / CSV_FILE, _csv([_flat(dataclasses.asdict(variant)) for variant in comparison.variants]))
    write_text(directory / RUNS_FILE, _csv([_flat(dataclasses.asdict(run)) for run in comparison.runs]))


def _run_figures(job: Job, root: Path) -> RunFigures:
    StoredFiles(job.directory).check(job.directory / JSON_NAME, job.directory / COSTS_FILE)
    matrix = AccuracyMatrix.load(job.directory)
    figures = matrix.to_dict()
    own = [matrix.score(after=name, on=name) for name in matrix.task_names]
    known = [score for score in own if score is not None]
    costs = read_costs(job.directory)
    cost: dict[str, float] = {name: sum(getattr(task, name) for task in costs) for name in _COSTS}
    # What a kill left untimed has no seconds.
    timed = [task for task in costs if task.step_seconds > 0]
    n_timed = sum(task.n_steps for task in timed)
    cost["step_seconds"] = sum(task.step_seconds * task.n_steps for task in timed) / max(1, n_timed)
    cost["step_peak_bytes"] = max(task.step_peak_bytes for task in costs)
    return RunFigures(
        variant=job.variant.label,
        order=job.order,
        seed=job.seed,
        directory=os.path.relpath(job.directory, root),
        op=matrix.op(),
        bwt=figures["bwt"],
        learnt=statistics.fmean(known) if len(known) == len(own) else None,
        cost=cost,
    )


def _variant_figures(variant: Variant, plan: Plan, runs: list[RunFigures]) -> VariantFigures:
    own = [run for run in runs if run.variant == variant.label]
    base = {run.pair: run.op for run in runs if run.variant == plan.baseline}
    differences = [run.op - base[run.pair] for run in own if run.pair in base]
    if variant.label == plan.baseline:
        differences = []
    return VariantFigures(
        label=variant.label,
        method=_method(variant, plan),
        settings=variant.settings,
        n=len(own),
        planned=len(plan.orders) * len(plan.seeds),
        op=_spread([run.op for run in own]),
        bwt=_spread([run.bwt for run in own if run.bwt is not None]),
        learnt=_spread([run.learnt for run in own if run.learnt is not None]),
        cost=_cost(own),
        against_baseline=PairedDifference.of(differences) if differences else None,
        gap_closed=_gap_closed(own, base, _upper_bound(plan, runs)),
    )


def _cost(runs: list[RunFigures]) -> dict[str, float] | None:
    """Means over the runs, but for the seconds of a step."""
    if not runs:
        return None
    means = {name: statistics.fmean(run.cost[name] for run in runs) for name in runs[0].cost}
    return {**means, "step_seconds": _fastest(runs)}


def _fastest(runs: list[RunFigures]) -> float:
    """Seconds of a step in the fastest run: what else a machine does only makes runs slower, some by three times."""
    return min((run.cost["step_seconds"] for run in runs if run.cost["step_seconds"]), default=0.0)


def _subject(plan: Plan) -> str | None:
    """The variant that the answer is about: of those of the recipe's own method, the one with the fewest settings;
    None where that is the baseline."""
    own = [variant for variant in plan.variants if _method(variant, plan) == plan.recipe.method_name]
    plain = min(own, key=lambda variant: len(variant.settings.keys() - {"method.name"}), default=None)
    return None if plain is None or plain.label == plan.baseline else plain.label


def _method(variant: Variant, plan: Plan) -> str:
    return str(variant.settings.get("method.name", plan.recipe.method_name))


def _upper_bound(plan: Plan, runs: list[RunFigures]) -> dict[tuple[int, int], float]:
    """OP of the variant that trains all tasks at once, by order and seed."""
    joint = [variant.label for variant in plan.variants if get_method(_method(variant, plan)).joint]
    return {run.pair: run.op for run in runs if joint and run.variant == joint[0]}


def _gap_closed(
    own: list[RunFigures], base: dict[tuple[int, int], float], upper: dict[tuple[int, int], float]
) -> float | None:
    """Of the means over the orders and seeds that all three have; None where the gap is below a point."""
    common = [run for run in own if run.pair in base and run.pair in upper]
    if not common:
        return None
    low = statistics.fmean(base[run.pair] for run in common)
    gap = statistics.fmean(upper[run.pair] for run in common) - low
    return (statistics.fmean(run.op for run in common) - low) / gap if gap >= SMALLEST_GAP else None


def _spread(values: list[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _percent(value: Spread | PairedDifference | None, signed: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    return mean if value.sd is None else f"{mean} ± {100 * value.sd:.1f}"


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict) and key != "settings":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
    return flat


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
