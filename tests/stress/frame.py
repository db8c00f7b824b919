"""Cases in processes of their own, some at a time, and the line of counts of each family."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .bench import BAD, DIFFERENT, IDENTICAL, OUTCOMES, REFUSED, TRACEBACK, UNNAMED, Outcome

PATIENCE = 900.0
"""Seconds after which a whole case hangs."""


@dataclass(frozen=True)
class Case:
    """What is done, in words, and the doing, in an empty folder."""

    title: str
    act: Callable[[Path], Outcome]


@dataclass
class Counts:
    """What became of the cases of one ``family``."""

    family: str
    kinds: Counter[str]
    failed: list[str]

    def __str__(self) -> str:
        labels = [*dict.fromkeys([*OUTCOMES, *self.kinds])]
        counts = (f"{self.kinds[label]} {label}" for label in labels if self.kinds[label] or label not in _WHERE_SEEN)
        return f"{self.family}: {self.kinds.total()} tried, {', '.join(counts)}"


_WHERE_SEEN = {UNNAMED, IDENTICAL}


def chosen(cases: Iterable[Case], seed: int, count: int | None, numbers: set[int]) -> list[tuple[int, Case]]:
    """``count`` of the cases with their numbers, drawn with ``seed``; all for None; those of ``numbers`` if any."""
    numbered = list(enumerate(cases))
    if numbers:
        return [(number, case) for number, case in numbered if number in numbers]
    if count is None or count >= len(numbered):
        return numbered
    return sorted(random.Random(seed).sample(numbered, count), key=lambda entry: entry[0])


def run_cases(family: str, cases: list[tuple[int, Case]], folder: Path, n_workers: int, repeat: str) -> Counts:
    """Act out all cases, ``n_workers`` at a time; ``repeat`` is the command that does one again, but for its number."""
    counts = Counts(family, Counter(), [])
    for number, case, outcome in _outcomes(cases, folder, n_workers):
        counts.kinds[outcome.kind] += 1
        if outcome.kind in BAD:
            counts.failed.append(f"{outcome.kind}: {case.title}\n    {outcome.detail}\n    again: {repeat} {number}")
            print(counts.failed[-1], file=sys.stderr, flush=True)
    return counts


def _outcomes(cases: list[tuple[int, Case]], folder: Path, n_workers: int) -> Iterator[tuple[int, Case, Outcome]]:
    waiting = list(reversed(cases))
    working: dict[int, tuple[int, Case, Path, float]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < n_workers:
                number, case = waiting.pop()
                place = folder / f"case-{number}"
                working[_begun(case, place)] = (number, case, place, time.monotonic())
            for pid, (number, case, place, began) in list(working.items()):
                if _is_over(pid, began):
                    del working[pid]
                    yield number, case, _told(place)
                    shutil.rmtree(place, ignore_errors=True)
            time.sleep(0.005)
    finally:
        for pid in working:
            # Of a harness that is stopped: its cases are in sessions of their own.
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _begun(case: Case, place: Path) -> int:
    """Process number of a case that is acted out in ``place/work``; its outcome is ``place/outcome.json``."""
    (place / "work").mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        try:
            outcome = case.act(place / "work")
        except Exception:
            outcome = Outcome(TRACEBACK, f"in the harness itself: {traceback.format_exc()}")
        (place / "outcome.json").write_text(json.dumps([outcome.kind, outcome.detail]), encoding="utf-8")
    finally:
        os._exit(0)


def _is_over(pid: int, began: float) -> bool:
    if time.monotonic() - began > PATIENCE:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def _told(place: Path) -> Outcome:
    path = place / "outcome.json"
    if not path.exists():
        return Outcome(TRACEBACK, "the case did not end")
    return Outcome(*json.loads(path.read_text(encoding="utf-8")))


_VERDICTS = {"accepted": "accepted", "refused": REFUSED, "unclear": UNNAMED, "unusable": DIFFERENT}
"""What ``check_one`` says, and how it counts; anything else is a traceback."""


def mutated(module: object, seed: int, count: int) -> Iterator[Case]:
    """The cases of a module with ``mutations`` and ``check_one``."""
    for case in module.mutations(seed, count):  # type: ignore[attr-defined]

        def act(folder: Path, case: object = case) -> Outcome:
            verdict = module.check_one(case, folder)  # type: ignore[attr-defined]
            return Outcome(_VERDICTS.get(verdict.partition(":")[0], TRACEBACK), verdict)

        yield Case(str(getattr(case, "name", None) or repr(case)[:300]), act)
