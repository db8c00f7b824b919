"""Ends upon ends: runs that are killed while they go on after a kill, repairs and exports that are killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .bench import DIFFERENT, IDENTICAL, TRACEBACK, Bench, Outcome, contents, copied, ended_alike, go_on, start
from .bench import write_recipe as written_recipe
from .families import damaged_files, repaired, stored_runs, sums_of_files
from .frame import Case
from .operations import signal_self, watch
from .process import End, command

END = signal.SIGKILL
_BEGINNING = 25
"""Operations with which a run that goes on tidies up what the one before it has left."""


def chains(bench: Bench, seed: int) -> Iterator[Case]:
    """Ended before one operation on a file, then, going on, before another one, up to four times."""
    for variant in ("seekr", "saving", "ewc", "lwf", "multitask"):
        reference, n_operations = bench.reference(variant), len(bench.operations(variant))
        for number in range(40):
            draw = random.Random(f"{seed} {variant} {number}")
            ends = [(draw.randrange(n_operations), draw.choice((END, END, END, signal.SIGTERM)))]
            for _ in range(draw.randint(1, 3)):
                limit = draw.choice((_BEGINNING, n_operations))
                ends.append((draw.randrange(limit), draw.choice((END, END, END, signal.SIGINT))))
            told = ", then ".join(f"{number.name} before operation {at}" for at, number in ends)
            yield Case(f"{variant}: {told}", partial(_ended_again, reference, variant, ends))


def _ended_again(reference: Path, variant: str, ends: list[tuple[int, int]], folder: Path) -> Outcome:
    recipe, run = written_recipe(folder, variant), folder / "run"
    begin: Callable[..., End] = start
    for at, number in ends:
        end = begin(recipe, prepare=partial(_end_at, run, at, number))
        if end.code not in (0, -number, 128 + number) or "Traceback" in end.err:
            return Outcome(TRACEBACK, f"was to be ended, but: {end}")
        verified = command("inspect", run, "--verify")
        if verified.code != 0 and "so nothing in it can be checked" not in verified.err:
            return Outcome(DIFFERENT, f"nothing was damaged, but: {verified}")
        begin = go_on
    if run.exists():
        repaired_run = command("repair", run)
        if repaired_run.code != 0 or "is whole; nothing was changed" not in repaired_run.out:
            return Outcome(DIFFERENT, f"nothing was damaged, but: {repaired_run.out} {repaired_run}")
    return ended_alike(go_on(recipe), run, reference)


def _end_at(folder: Path, at: int, number: int) -> None:
    watch(folder, signal_self(at, number))


def repair_kills(bench: Bench, seed: int) -> Iterator[Case]:
    """A repair is killed before one of its operations, and done again: nothing whole is lost, and the end the same."""
    draw = random.Random(seed)
    for variant, run in stored_runs(bench):
        reference = bench.reference(variant)
        for name, what, done in damaged_files(run, seed):
            if name != ".lock":
                at = draw.randrange(40)
                title = f"{variant}, {run.parent.name}: {name} {what}; repair killed before operation {at}"
                yield Case(title, partial(_repair_killed, run, variant, name, done, reference, at))


def _repair_killed(
    run: Path, variant: str, name: str, done: Callable[[Path], None], reference: Path, at: int, folder: Path
) -> Outcome:
    ours = copied(run, folder, variant)
    before = sums_of_files(ours)
    done(ours / name)
    whole = before & sums_of_files(ours)
    end = command("repair", ours, prepare=partial(_end_at, ours, at, END))
    if end.code not in (0, -END):
        return Outcome(TRACEBACK, f"was to be killed, but: {end}")
    lost = whole - sums_of_files(ours)
    if lost:
        return Outcome(DIFFERENT, f"the killed repair lost {sum(lost.values())} files that were whole")
    return repaired(ours, name, whole, reference, at_once=at % 2 == 0)


def reading_kills(bench: Bench, seed: int) -> Iterator[Case]:
    """``export`` and ``report`` are killed before each of their operations, and done again over what that has left."""
    for variant in ("seekr", "multitask"):
        for what, out in (("export", "out"), ("report", "page/report.html"), ("report", "run/report.html")):
            for at in range(12):
                title = f"{variant}: {what} into {out} killed before operation {at}"
                yield Case(title, partial(_reading_killed, bench.reference(variant), variant, what, out, at))


def _reading_killed(run: Path, variant: str, what: str, out: str, at: int, folder: Path) -> Outcome:
    ours = copied(run, folder, variant)
    (folder / "page").mkdir()
    (ours / "report.html").unlink()
    call: Any = partial(command, what, ours, "--out", folder / out)
    end = call(prepare=partial(_end_at, folder, at, END))
    if end.code not in (0, -END):
        return Outcome(TRACEBACK, f"was to be killed, but: {end}")
    if what == "export" and end.code == -END and (folder / out).exists():
        # A folder that somebody made is not written over; what a kill has left is complete or is not there.
        return _same_files(folder / out, run / "adapter")
    end = call()
    if end.code != 0 and what == "report":
        return Outcome(TRACEBACK, str(end))
    left = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    if left:
        return Outcome(DIFFERENT, f"leaves {left}")
    return _same_files(folder / out, run / "adapter") if what == "export" else _same_run(ours, run)


def _same_files(one: Path, other: Path) -> Outcome:
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return Outcome(IDENTICAL) if files[0] == files[1] else Outcome(DIFFERENT, f"{one} holds {sorted(files[0])}")


def _same_run(ours: Path, run: Path) -> Outcome:
    other = {name for name in contents(run) if contents(ours).get(name, "there") != contents(run)[name]}
    return Outcome(DIFFERENT, f"changed {sorted(other)}") if other else Outcome(IDENTICAL)


FAMILIES: dict[str, Callable[[Bench, int], Iterator[Case]]] = {
    "chains": chains,
    "repair-kills": repair_kills,
    "reading-kills": reading_kills,
}
USUAL = {"chains": 60, "repair-kills": 40, "reading-kills": 24}
