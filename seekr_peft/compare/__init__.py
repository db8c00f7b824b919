"""Several methods side by side on the same base, data, orders, seeds and optimiser steps: ``compare``.

``plan`` says which runs there are and this file runs what is missing; ``checks`` says that they are comparable,
``statistics`` what they say together and ``answer`` the same in words, and ``results`` and ``page`` write it down.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from rich.console import Console
from rich.markup import escape

from ..errors import DivergenceError, RunError, RunInUseError, SeekrError
from ..model.devices import check_one_device
from ..recipe import Recipe
from ..run.directory import RECIPE_FILE, is_finished, recipe_difference
from ..run.runner import RunResult, run_recipe
from ..terminal import TerminalConsole
from ..training.stopping import RunStopped, listening
from .checks import FinishedRun, check_comparable
from .plan import Job, Plan, Variant, plan_comparison
from .results import TABLE_FILE, Comparison, read_comparison, write_comparison_files

__all__ = [
    "Comparison",
    "FinishedRun",
    "Job",
    "Plan",
    "Variant",
    "check_comparable",
    "compare",
    "plan_comparison",
    "read_comparison",
]

LOGS = "logs"


def compare(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    orders: int | Sequence[Sequence[str]] | None = None,
    run: bool = True,
    show: Literal["summary", "runs"] = "summary",
    console: Console | None = None,
) -> Comparison:
    """Run what is missing, skip what is finished, and write the table and the page into the recipe's ``output_dir``.

    Each run has a folder ``runs/VARIANT/orderN-seedS``. Stopped at any moment, the same call goes on where it was. A
    run that another process is working on is left to it, so the same command may be started several times to use
    several cores or GPUs.

    Args:
        source, overrides: As for ``run_recipe``; the recipe's ``compare`` section has the defaults of all below.
        methods: Labels of the recipe's variants, or names of methods.
        seeds: One run of each variant and order per seed.
        orders: Orders of the recipe's tasks, or how many: the recipe's own, then seeded shuffles of it.
        run: False only gathers what is finished, as while other processes are at work.
        show: "summary": a line a run, whose own output goes into a log, and at the end the table and the answer.
            "runs": each run with its bars and a page of its own, and no table.

    Raises:
        ConfigError: A recipe of one of the variants has mistakes, or there are several processes or GPUs; nothing was
            run.
        RunError: Runs are not comparable, or one of them cannot go on.
    """
    with listening():
        try:
            plan = plan_comparison(source, overrides, methods=methods, seeds=seeds, orders=orders)
            return _compare(plan, console or _console(), run, show == "runs")
        except RunStopped as stop:
            stop.go_on_with("the same command goes on")
            raise


def _console() -> Console:
    return TerminalConsole(stderr=True, width=None if sys.stderr.isatty() else 120)


def _compare(plan: Plan, console: Console, run: bool, shows_runs: bool) -> Comparison:
    if run:
        check_one_device()
    _make_folders(plan)
    missing = [job for job in plan.jobs if not _is_done(job, plan)]
    if len(missing) < len(plan.jobs):
        _say(console, f"{len(plan.jobs) - len(missing)} of {len(plan.jobs)} runs are finished already")
    try:
        if run:
            _run_all(missing, plan, console, shows_runs)
    except SeekrError:
        # What is finished need not wait for what failed.
        with suppress(SeekrError):
            _gather(plan)
        raise
    comparison, page = _gather(plan)
    if not shows_runs:
        _summarise(comparison, plan, page, console)
    return comparison


def _make_folders(plan: Plan) -> None:
    try:
        (plan.directory / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output_dir {plan.directory} cannot be made ({error.strerror}); choose another.") from error


def _summarise(comparison: Comparison, plan: Plan, page: Path, console: Console) -> None:
    console.print(comparison.to_rich_table())
    for sentence in filter(None, (comparison.answer(), comparison.test_sentence())):
        _say(console, sentence)
    _say(console, f"table: {plan.directory / TABLE_FILE}   page: {page}")


def _run_all(missing: list[Job], plan: Plan, console: Console, shows_runs: bool) -> None:
    """Run what is missing; a run in another process's hands is put off, and tried once more at the end.

    A run that diverges says nothing of the others: its error is raised when they are done.
    """
    busy: list[Job] = []
    diverged: list[RunError] = []
    for job in missing:
        try:
            if not _run(job, plan, console, shows_runs):
                busy.append(job)
        except RunError as error:
            if not isinstance(error.__cause__, DivergenceError):
                raise
            _say(console, str(error))
            diverged.append(error)
    busy = [job for job in busy if not _run(job, plan, console, shows_runs)]
    if diverged:
        raise diverged[0]
    if busy:
        _say(console, f"{len(busy)} runs are in another process's hands; give the same command again when it ended.")


def _run(job: Job, plan: Plan, console: Console, shows_it: bool) -> bool:
    """Whether the run is finished now."""
    # Another process may have finished it meanwhile.
    if _is_done(job, plan):
        return True
    started = time.monotonic()
    log = plan.directory / LOGS / f"{job.slug}.log"
    try:
        result = _run_shown(job, console) if shows_it else _run_logged(job, log)
    except RunInUseError:
        return False
    except SeekrError as error:
        where = "" if shows_it else f" (its log: {log})"
        raise RunError(f"{job}: {error}{where}") from error
    n_done = sum(is_finished(other.directory) for other in plan.jobs)
    seconds = time.monotonic() - started
    if not shows_it:
        _say(console, f"[{n_done}/{len(plan.jobs)}] {job}: OP {100 * result.matrix.op():.1f} ({seconds:.0f} s)")
    return True


def _run_shown(job: Job, console: Console) -> RunResult:
    console.rule(f"[bold]{escape(job.variant.label)}", align="left")
    return run_recipe(job.recipe, resume="auto", console=console)


def _run_logged(job: Job, log: Path) -> RunResult:
    """What the run prints goes into the file ``log``."""
    with log.open("a", encoding="utf-8") as file:
        return run_recipe(job.recipe, resume="auto", console=TerminalConsole(file=file, width=120), report=False)


def _gather(plan: Plan) -> tuple[Comparison, Path]:
    """Write the table and the page of what is finished; one process at a time."""
    with FileLock(plan.directory / ".lock"):
        comparison = read_comparison(plan, command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
        write_comparison_files(comparison, plan.directory)
        from .page import write_comparison_page  # loads matplotlib

        return comparison, write_comparison_page(plan.directory)


def _is_done(job: Job, plan: Plan) -> bool:
    """Whether the run is finished; RunError when it was another recipe's."""
    path = job.directory / RECIPE_FILE
    if not path.is_file() or not is_finished(job.directory):
        return False
    changed = recipe_difference(path, job.recipe)
    if changed:
        where = "compare.runs_dir" if plan.recipe.compare.runs_dir else "output_dir"
        raise RunError(
            f"{job.directory} holds a finished run of another recipe ({changed}); choose another {where}, or delete "
            f"that folder to run it again."
        )
    return True


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
