"""Damage beyond one file's bytes: whole folders, links, what others put there, files of other runs, several at once."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .bench import (
    BAD,
    DIFFERENT,
    IDENTICAL,
    REFUSED,
    TRACEBACK,
    UNNAMED,
    Bench,
    Outcome,
    copied,
    ended_alike,
    go_on,
    start,
)
from .families import IN_TASK, READINGS, came_to_the_same, damaged_files, read_alike, stored_runs, sums_of_files, worst
from .frame import Case
from .process import command

Change = Callable[[Path], None]


# Folders ------------------------------------------------------------------------------------------------------------


def _file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def _loop_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.name)


def _link_to_nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


def _emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _swapped(path: Path) -> None:
    other = _sibling(path)
    assert other is not None
    aside = path.with_name(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def _sibling(path: Path) -> Path | None:
    return next((other for other in sorted(path.parent.iterdir()) if other.is_dir() and other != path), None)


def _renamed(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}-old"))


_OF_FOLDERS: dict[str, Change] = {
    "removed": shutil.rmtree, "a file": _file_instead, "a loop of links": _loop_instead, "emptied": _emptied,
    "a link to nothing": _link_to_nothing, "swapped with its neighbour": _swapped, "renamed": _renamed,
}  # fmt: skip


def folders(bench: Bench, seed: int) -> Iterator[Case]:
    """Every folder of a run is removed, replaced, swapped, moved to another disk; then read, resumed, repaired."""
    for variant, run in _runs(bench):
        for path in sorted(path for path in run.rglob("*") if path.is_dir()):
            name = path.relative_to(run).as_posix()
            for what, change in _OF_FOLDERS.items():
                if what.startswith("swapped") and _sibling(path) is None:
                    continue
                act = partial(_read_and_mended, bench, run, variant, name, change)
                yield Case(f"{variant}, {run.parent.name}: {name} {what}", act)
            title = f"{variant}, {run.parent.name}: {name} moved elsewhere, with a link"
            yield Case(title, partial(_moved_with_link, bench, run, variant, name))


def _runs(bench: Bench) -> Iterator[tuple[str, Path]]:
    yield from stored_runs(bench)
    yield "saving", bench.interrupted("saving", IN_TASK)
    yield "multitask", bench.reference("multitask")


def _moved_with_link(bench: Bench, run: Path, variant: str, name: str, folder: Path) -> Outcome:
    ours = copied(run, folder, variant)
    elsewhere = folder / "elsewhere"
    (ours / name).rename(elsewhere)
    (ours / name).symlink_to(elsewhere)
    before = sums_of_files(elsewhere)
    end = go_on(folder / "recipe.yaml")
    if end.failed:
        return Outcome(TRACEBACK, str(end))
    if (ours / name).is_symlink():
        lost = before - sums_of_files(elsewhere)
        if lost and name.startswith(("tasks/01", "predictions/01")):
            return Outcome(DIFFERENT, f"what was moved elsewhere lost {sum(lost.values())} files")
        (ours / name).unlink()
        elsewhere.rename(ours / name)
    if end.code == 2:
        return Outcome(REFUSED if end.refused and Path(name).name in end.err else UNNAMED, str(end))
    return ended_alike(end, ours, bench.reference(variant))


# What becomes of it -------------------------------------------------------------------------------------------------


def _read_and_mended(bench: Bench, run: Path, variant: str, name: str, change: Change, folder: Path) -> Outcome:
    """All commands that read, ``--resume``, and ``repair`` in another copy."""
    reference, label = bench.reference(variant), Path(name).name
    if change is _swapped:
        # Either of the two is a right answer; this is what both are called.
        label = Path(name).parent.name
    ours = copied(run, folder, variant)
    change(ours / name)
    found = [read_alike(what, ours, run, label) for what in READINGS]
    resumed = ended_alike(go_on(folder / "recipe.yaml"), ours, reference, label)
    found.append(Outcome(resumed.kind, f"resume: {resumed.detail}"))
    again = folder / "again"
    ours = copied(run, again, variant)
    before = sums_of_files(ours)
    change(ours / name)
    found.append(mended(ours, before & sums_of_files(ours), reference, run, name))
    return worst(found)


def mended(ours: Path, whole: Counter[str], reference: Path, original: Path, *names: str) -> Outcome:
    """What ``repair`` and ``--resume`` make of a damaged run: all that was ``whole`` is there, and it ends as the
    ``reference``, but for old answers and the losses of steps where these were damaged, which cannot be had again."""
    end = command("repair", ours)
    if end.failed:
        return Outcome(TRACEBACK, f"repair: {end}")
    if end.code == 2:
        return Outcome(REFUSED if any(Path(name).name in end.err for name in names) else UNNAMED, f"repair: {end}")
    lost = whole - sums_of_files(ours)
    if lost:
        return Outcome(DIFFERENT, f"repair lost {sum(lost.values())} files that were whole: {end.out}")
    end = start(ours.parent / "recipe.yaml", "--resume")
    if end.code == 2 and "start it without --resume" in end.err:
        end = start(ours.parent / "recipe.yaml")
    if end.failed or end.code != 0:
        return Outcome(TRACEBACK if end.failed else UNNAMED, f"repaired, then resume: {end}")
    return came_to_the_same(ours, reference, *names)


# What others put there ----------------------------------------------------------------------------------------------


_ADDED: dict[str, Change] = {
    ".DS_Store": lambda path: _added(path, b"\0\0\0\1Bud1"),
    "notes.txt": lambda path: _added(path, b"my notes"),
    "03-third": lambda path: _added_folder(path, "adapter.txt"),
    "mine": lambda path: _added_folder(path, "of-mine.txt"),
    "link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
    "\u00e9 \u65e5\u672c": lambda path: _added(path, b"x"),
}  # fmt: skip


def _added_folder(path: Path, name: str) -> None:
    path.mkdir()
    _added(path / name, b"x")


def _added(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def added(bench: Bench, seed: int) -> Iterator[Case]:
    """Something that is no part of a run lies in one of its folders: it stays, and changes nothing."""
    for variant, run in _runs(bench):
        places = ["", *(path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_dir())]
        for place in places:
            for name, change in _ADDED.items():
                act = partial(_with_added, bench, run, variant, f"{place}/{name}".lstrip("/"), change)
                yield Case(f"{variant}, {run.parent.name}: {name} in {place or 'it'}", act)


def _with_added(bench: Bench, run: Path, variant: str, name: str, change: Change, folder: Path) -> Outcome:
    ours, label = copied(run, folder, variant), Path(name).name
    change(ours / name)
    found = [read_alike(what, ours, run, label) for what in READINGS]
    end = go_on(folder / "recipe.yaml")
    if end.code == 2:
        kind = REFUSED if end.refused and label in end.err else UNNAMED
        return worst([*found, Outcome(kind, f"resume: {end}")])
    gone = not os.path.lexists(ours / name)
    _taken_away(ours / name)
    resumed = ended_alike(end, ours, bench.reference(variant))
    unfinished = name.startswith(("tasks/03-third", "checkpoints/"))
    if gone and resumed.kind == IDENTICAL and not unfinished:
        return worst([*found, Outcome(DIFFERENT, f"resume deleted {name}")])
    return worst([*found, Outcome(resumed.kind, f"resume: {resumed.detail}")])


def _taken_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Files of other runs, other times, and several at once ----------------------------------------------------------------


def strangers(bench: Bench, seed: int) -> Iterator[Case]:
    """A file, or a task's folder, is that of a run with another seed, or of the same run at another time."""
    for variant, run in stored_runs(bench):
        others = {"with another seed": bench.reference("other seed"), "whole": bench.reference(variant)}
        others["at another time"] = next(r for v, r in stored_runs(bench) if v == variant and r != run)
        for label, other in others.items():
            if label == "whole" or (label == "with another seed" and variant != "seekr"):
                continue
            for path in sorted(run.rglob("*")):
                name = path.relative_to(run).as_posix()
                change = partial(_taken_from, other, name)
                if name == ".lock" or not _is_other(path, other / name):
                    continue
                act = partial(_read_and_mended, bench, run, variant, name, change)
                yield Case(f"{variant}, {run.parent.name}: {name} of the run {label}", act)


def _is_other(path: Path, other: Path) -> bool:
    if path.is_dir():
        return path.name.startswith("0") and other.is_dir()
    return other.is_file() and path.read_bytes() != other.read_bytes()


def _taken_from(other: Path, name: str, path: Path) -> None:
    _taken_away(path)
    (shutil.copytree if (other / name).is_dir() else shutil.copyfile)(other / name, path)


def several(bench: Bench, seed: int) -> Iterator[Case]:
    """Two to six files are damaged at once: each is printed by ``--verify``, ``--resume`` names one, repair mends."""
    for variant, run in _runs(bench):
        every = [entry for entry in damaged_files(run, seed) if entry[0] != ".lock" and entry[1] != "swapped"]
        for number in range(60):
            draw = random.Random(f"{seed} {variant} {run.parent.name} {number}")
            drawn = {name: (what, done) for name, what, done in draw.sample(every, draw.randint(2, 6))}
            told = ", ".join(f"{name} {what}" for name, (what, _) in drawn.items())
            changes = {name: done for name, (_, done) in drawn.items()}
            yield Case(f"{variant}, {run.parent.name}: {told}", partial(_several, bench, run, variant, changes))


def _several(bench: Bench, run: Path, variant: str, changes: dict[str, Change], folder: Path) -> Outcome:
    ours, reference = copied(run, folder, variant), bench.reference(variant)
    before = sums_of_files(ours)
    for name, change in changes.items():
        change(ours / name)
    whole = before & sums_of_files(ours)
    verified = command("inspect", ours, "--verify")
    told = [name for name in changes if f"{ours / name} " in verified.err]
    if verified.failed:
        return Outcome(TRACEBACK, f"verify: {verified}")
    end = start(folder / "recipe.yaml", "--resume")
    if told:
        if not (end.refused and any(name in end.err for name in changes)):
            return Outcome(TRACEBACK if end.failed else DIFFERENT, f"verify names {told}, resume: {end}")
        if whole - sums_of_files(ours):
            return Outcome(DIFFERENT, "the refused resume deleted something")
        found = mended(ours, whole, reference, run, *changes)
        return found if found.kind in BAD else Outcome(REFUSED)
    return ended_alike(end, ours, reference)


FAMILIES: dict[str, Callable[[Bench, int], Iterator[Case]]] = {
    "folders": folders,
    "added": added,
    "strangers": strangers,
    "several": several,
}
USUAL = {"folders": 60, "added": 40, "strangers": 40, "several": 40}
