"""Several methods side by side on the same base, data, orders, seeds and optimiser steps: ``compare``.

plan.py says which runs there are, checks.py that they are comparable, statistics.py what they say together, and this
file runs what is missing. May import ``run`` and everything below it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import RunError, RunInUseError
from ..recipe import Recipe
from ..report import write_comparison_page
from ..run import RECIPE_FILE, is_finished, recipe_difference, run_recipe
from .checks import SAME, check_comparable
from .plan import Job, Plan, Variant, plan_comparison
from .results import Comparison, read_comparison, write_comparison_files

__all__ = [
    "SAME",
    "Comparison",
    "Job",
    "Plan",
    "Variant",
    "check_comparable",
    "compare",
    "plan_comparison",
    "read_comparison",
]

LOGS = "logs"

logger = logging.getLogger("seekr_peft")


def compare(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    orders: int | Sequence[Sequence[str]] | None = None,
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

    Raises:
        ConfigError: A recipe of one of the variants has mistakes; nothing was run.
        RunError: Runs are not comparable, or one of them cannot go on.
    """
    plan = plan_comparison(source, overrides, methods=methods, seeds=seeds, orders=orders)
    console = console or Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    directory = plan.directory
    (directory / LOGS).mkdir(parents=True, exist_ok=True)
    waiting = [job for job in plan.jobs if not _is_done(job)]
    n_done = len(plan.jobs) - len(waiting)
    if n_done:
        _say(console, f"{n_done} of {len(plan.jobs)} runs are finished already")
    busy = 0
    for job in waiting:
        # Another process may have finished it meanwhile.
        if _is_done(job):
            n_done += 1
            continue
        started = time.monotonic()
        try:
            op = _run(job, directory / LOGS / f"{job.slug}.log")
        except RunInUseError:
            busy += 1
            continue
        n_done += 1
        _say(console, f"[{n_done}/{len(plan.jobs)}] {job}: OP {100 * op:.1f} ({time.monotonic() - started:.0f} s)")
    if busy:
        _say(console, f"{busy} runs are in progress in another process; give the same command again when they ended.")
    comparison = read_comparison(plan, command=" ".join(sys.argv))
    write_comparison_files(comparison, directory)
    page = write_comparison_page(directory)
    console.print(comparison.to_rich_table())
    _say(console, comparison.test_sentence())
    _say(console, f"table: {directory / 'comparison.md'}   page: {page}")
    return comparison


def _run(job: Job, log: Path) -> float:
    """OP of one run; what it would print goes into ``log``."""
    with log.open("a", encoding="utf-8") as file:
        result = run_recipe(
            job.recipe,
            resume=(job.directory / RECIPE_FILE).is_file(),
            console=Console(file=file, width=120),
            report=False,
        )
    return result.matrix.op()


def _is_done(job: Job) -> bool:
    """Whether the run is finished; RunError when it was another recipe's."""
    path = job.directory / RECIPE_FILE
    if not path.is_file() or not is_finished(job.directory):
        return False
    changed = recipe_difference(path, job.recipe)
    if changed:
        raise RunError(
            f"{job.directory} holds a finished run of another recipe ({changed}); choose another output_dir, or delete "
            f"that folder to run it again."
        )
    return True


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
