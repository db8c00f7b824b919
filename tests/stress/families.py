"""What is done to runs: kills, damaged files, signals, full disks, folders that cannot be written, and repairs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bench import (
    BAD,
    DIFFERENT,
    IDENTICAL,
    OUTCOMES,
    REFUSED,
    TRACEBACK,
    UNNAMED,
    Bench,
    Outcome,
    contents,
    copied,
    ended_alike,
    go_on,
    start,
    write_recipe,
)
from .damages import damages, namesake
from .frame import Case
from .operations import kill_self, signal_self, watch
from .process import End, Signal, command, forked, real_command

SECONDS = 3.0
"""About what a run takes; random instants lie in it."""
EVALUATING = "predictions/02-last/.01-first.jsonl.partial"
IN_TASK = "checkpoints/02-last/.checkpoint-6.partial/.manifest.json.partial"


def worst(outcomes: list[Outcome]) -> Outcome:
    """The one that says most against the package."""
    return max(outcomes, key=lambda outcome: (outcome.kind in BAD, OUTCOMES.index(outcome.kind)))


# Kills --------------------------------------------------------------------------------------------------------------


def kills(bench: Bench, seed: int) -> Iterator[Case]:
    """Killed before every operation on a file, and at random instants; some in new interpreters."""
    for variant in ("seekr", "ewc"):
        yield from _kills_of(bench, variant, seed)


def checkpoint_kills(bench: Bench, seed: int) -> Iterator[Case]:
    """The same for a run that keeps checkpoints inside its tasks."""
    yield from _kills_of(bench, "saving", seed)


def _kills_of(bench: Bench, variant: str, seed: int) -> Iterator[Case]:
    reference, draw = bench.reference(variant), random.Random(f"{seed} {variant}")
    for at, text in enumerate(bench.operations(variant)):
        real = draw.random() < 0.01
        yield Case(f"{variant}: killed before operation {at} ({text})", _killed_at(reference, variant, at, real))
    for _ in range(12):
        after = draw.uniform(0, SECONDS)
        yield Case(f"{variant}: killed after {after:.3f} s", _killed_after(reference, variant, after, real=False))
    for _ in range(4):
        after = draw.uniform(0, 5 * SECONDS)
        yield Case(f"{variant}: killed after {after:.3f} s, new interpreter", _killed_after(reference, variant, after))


def _killed_at(reference: Path, variant: str, at: int, real: bool) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        recipe, run = write_recipe(folder, variant), folder / "run"
        if real:
            places = {"STRESS_FOLDER": str(run), "STRESS_AT": str(at)}
            end = real_command("run", recipe, module="stress.operations", **places)
        else:
            end = start(recipe, prepare=lambda: watch(run, kill_self(at)))
        if end.code != -signal.SIGKILL:
            return Outcome(TRACEBACK, f"was to be killed, but: {end}")
        return ended_alike(go_on(recipe), run, reference)

    return act


def _killed_after(reference: Path, variant: str, after: float, real: bool = True) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        recipe, sent = write_recipe(folder, variant), Signal(signal.SIGKILL, after)
        end = real_command("run", recipe, sent=sent) if real else start(recipe, sent=sent)
        if end.code not in (0, -signal.SIGKILL):
            return Outcome(TRACEBACK, f"was to be killed, but: {end}")
        return ended_alike(go_on(recipe), folder / "run", reference)

    return act


# Damage -------------------------------------------------------------------------------------------------------------


def damage(bench: Bench, seed: int) -> Iterator[Case]:
    """Every stored file of a finished and of an interrupted run is damaged, and read by every command."""
    for variant, run in stored_runs(bench):
        reference = bench.reference(variant)
        for name, what, done in damaged_files(run, seed):
            act = _damaged(run, variant, name, done, reference)
            yield Case(f"{variant}, {run.parent.name}: {name} {what}", act)


def stored_runs(bench: Bench) -> Iterator[tuple[str, Path]]:
    for variant in ("seekr", "ewc"):
        yield variant, bench.reference(variant)
        yield variant, bench.interrupted(variant, EVALUATING)


def damaged_files(run: Path, seed: int) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Names of a run's files, with each way to damage them."""
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        for what, done in damages(random.Random(f"{seed} {name}")).items():
            if (what == "swapped" and namesake(path) is None) or _leaves(what, path):
                continue
            yield name, what, done


def _leaves(what: str, path: Path) -> bool:
    """Whether a file is too small for a damage to change it."""
    size = path.stat().st_size
    return (what == "emptied" and size == 0) or (what.startswith("cut") and size < 3)


def restored(run: Path) -> None:
    """``from_pretrained`` over a fresh model; prints a checksum of the adapters."""
    from seekr_peft.methods import get_method
    from seekr_peft.recipe import load_recipe
    from seekr_peft.recipe.base_model import load_model

    recipe = load_recipe(run.parent / "recipe.yaml")
    method = get_method(recipe.method_name).from_pretrained(load_model(recipe)[0], run)
    digest = hashlib.sha256()
    for name, tensor in sorted(method.model.state_dict().items()):
        if "lora" in name:
            digest.update(tensor.detach().cpu().numpy().tobytes())
    print(method.task_names, digest.hexdigest())


def _from_pretrained(run: Path) -> End:
    def call() -> None:
        from seekr_peft.errors import SeekrError

        try:
            restored(run)
        except SeekrError as error:
            print(f"seekr-peft: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return forked(call)


def _exported(run: Path, **options: Any) -> End:
    out = run.parent / "out"
    end = command("export", run, "--out", out, **options)
    return _with_files(end, out)


def _reported(run: Path, **options: Any) -> End:
    out = run.parent / "page"
    out.mkdir(exist_ok=True)
    out.chmod(0o777)
    end = command("report", run, "--out", out / "report.html", **options)
    return _with_files(end, out)


def _with_files(end: End, out: Path) -> End:
    """With the checksums of what was written as a part of what was said; and nothing is left to be written over."""
    if end.code != 0:
        shutil.rmtree(out, ignore_errors=True)
        return end
    parts = [path.read_bytes().replace(os.fsencode(out.parent), b"") for path in sorted(out.rglob("*.*"))]
    shutil.rmtree(out, ignore_errors=True)
    return End(0, end.out + hashlib.sha256(b"".join(parts)).hexdigest(), end.err)


READINGS: dict[str, Callable[..., End]] = {
    "export": _exported,
    "report": _reported,
    "inspect": lambda run, **options: command("inspect", run, **options),
    "verify": lambda run, **options: command("inspect", run, "--verify", **options),
    "from_pretrained": _from_pretrained,
}
"""What each command that only reads comes to over a run."""


def _damaged(
    run: Path, variant: str, name: str, done: Callable[[Path], None], reference: Path
) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        ours = copied(run, folder, variant)
        done(ours / name)
        found = [read_alike(label, ours, run, Path(name).name) for label in READINGS]
        resumed = ended_alike(go_on(folder / "recipe.yaml"), ours, reference, Path(name).name)
        return worst([*found, Outcome(resumed.kind, f"resume: {resumed.detail}")])

    return act


def read_alike(label: str, ours: Path, original: Path, name: str) -> Outcome:
    """Whether a command says of a damaged run what it says of the whole one, or names the damaged file."""
    read = READINGS[label]
    end = read(ours)
    if end.failed:
        return Outcome(TRACEBACK, f"{label}: {end}")
    if end.refused and name in end.err:
        return Outcome(REFUSED)
    wanted = _of_the_whole(read, ours, original)
    if (end.code, end.out) == (wanted.code, wanted.out) and (end.code == 0 or end.err == wanted.err):
        return Outcome(IDENTICAL)
    if end.code == 2:
        return Outcome(UNNAMED, f"{label}: {end}")
    return Outcome(DIFFERENT, f"{label} says {end.out[-300:]!r}, and of what is whole {wanted.out[-300:]!r}")


def _of_the_whole(read: Callable[..., End], ours: Path, original: Path) -> End:
    """What a command says of the undamaged run at the same path."""
    aside = ours.with_name("aside")
    ours.rename(aside)
    shutil.copytree(original, ours, symlinks=True)
    end = read(ours)
    shutil.rmtree(ours)
    aside.rename(ours)
    return end


def checkpoint_damage(bench: Bench, seed: int) -> Iterator[Case]:
    """Every file of a checkpoint inside a task is damaged: named by ``--resume``, and gone round by ``repair``."""
    reference, run = bench.reference("saving"), bench.interrupted("saving", IN_TASK)
    for name, what, done in damaged_files(run, seed):
        if name.startswith("checkpoints/02-last/checkpoint-"):
            yield Case(f"saving: {name} {what}", _damaged_checkpoint(run, name, done, reference))


def _damaged_checkpoint(run: Path, name: str, done: Any, reference: Path) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        ours = copied(run, folder, "saving")
        before = sums_of_files(ours)
        done(ours / name)
        end = start(folder / "recipe.yaml", "--resume")
        resumed = ended_alike(end, ours, reference, Path(name).name)
        if end.code == 0 or resumed.kind in BAD:
            return resumed
        return worst([resumed, repaired(ours, name, before, reference, at_once=False)])

    return act


# Repair -------------------------------------------------------------------------------------------------------------


def repair(bench: Bench, seed: int) -> Iterator[Case]:
    """A damaged run is repaired: nothing whole is lost, and it goes on to the same end."""
    for variant, run in stored_runs(bench):
        reference = bench.reference(variant)
        for name, what, done in damaged_files(run, seed):
            if name != ".lock":
                title = f"{variant}, {run.parent.name}: {name} {what}"
                yield Case(title, _damaged_and_repaired(run, variant, name, done, reference, len(what) % 2 == 0))


def _damaged_and_repaired(
    run: Path, variant: str, name: str, done: Any, reference: Path, at_once: bool
) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        ours = copied(run, folder, variant)
        before = sums_of_files(ours)
        done(ours / name)
        return repaired(ours, name, before, reference, at_once)

    return act


def sums_of_files(run: Path) -> Counter[str]:
    files = (
        path
        for path in run.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json", "environment.json")
    )
    return Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


def repaired(ours: Path, name: str, before: Counter[str], reference: Path, at_once: bool) -> Outcome:
    """``at_once``: by ``run --repair``, where ``repair`` and ``run --resume`` are two commands."""
    recipe, whole = ours.parent / "recipe.yaml", before & sums_of_files(ours)
    if not at_once:
        end = command("repair", ours)
        if end.code != 0:
            return Outcome(TRACEBACK, f"repair: {end}")
        lost = whole - sums_of_files(ours)
        if lost:
            return Outcome(DIFFERENT, f"repair lost {sum(lost.values())} files that were whole: {end.out}")
    end = start(recipe, "--repair" if at_once else "--resume")
    return came_to_the_same(ours, reference, name) if end.code == 0 else ended_alike(end, ours, reference, name)


def came_to_the_same(ours: Path, reference: Path, *names: str) -> Outcome:
    """Whether a repaired run has ended as the ``reference``, but for what cannot be had again where it was among the
    damaged ``names``: answers of a model that later tasks have changed, the losses of steps, and their figures."""
    found = {name: text for name, text in contents(ours).items() if not name.startswith("damaged-")}
    wanted = contents(reference)
    other = {name for name in {*found, *wanted} if found.get(name) != wanted.get(name)}
    other -= {name for name in other if any(_is_of(name, damaged) for damaged in names)}
    if other:
        return Outcome(DIFFERENT, f"repaired: other files than the reference: {', '.join(sorted(other)[:8])}")
    verified = command("inspect", ours, "--verify")
    return Outcome(IDENTICAL) if verified.code == 0 else Outcome(DIFFERENT, f"repaired, does not verify: {verified}")


def _is_of(name: str, damaged: str) -> bool:
    below = name == damaged or name.startswith(f"{damaged}/")
    drawn_from = damaged in ("metrics.jsonl", "predictions") and name.startswith("figures/")
    return drawn_from or (below and name.startswith(("predictions/", "metrics.jsonl", "figures/")))


# Signals ------------------------------------------------------------------------------------------------------------


def signals(bench: Bench, seed: int) -> Iterator[Case]:
    """SIGINT and SIGTERM at random instants of new interpreters, and before operations on files of forked processes."""
    draw = random.Random(seed)
    for number in (signal.SIGINT, signal.SIGTERM):
        for variant in ("seekr", "saving"):
            reference, operations = bench.reference(variant), bench.operations(variant)
            for at in sorted(draw.sample(range(len(operations)), 24)):
                title = f"{variant}: {number.name} before operation {at} ({operations[at]})"
                yield Case(title, _signalled(reference, variant, number, at=at))
            for _ in range(8):
                after = draw.uniform(0, SECONDS)
                title = f"{variant}: {number.name} after {after:.3f} s"
                yield Case(title, _signalled(reference, variant, number, after=after))
        for _ in range(8):
            after = draw.uniform(0, 5 * SECONDS)
            title = f"{number.name} after {after:.3f} s, new interpreter"
            yield Case(title, _signalled(bench.reference("seekr"), "seekr", number, after=after, real=True))


def _signalled(
    reference: Path, variant: str, number: int, *, at: int | None = None, after: float = 0.0, real: bool = False
) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        recipe, run, sent = write_recipe(folder, variant), folder / "run", Signal(number, after)
        if at is not None:
            end = start(recipe, prepare=lambda: watch(run, signal_self(at, number)))
        else:
            end = real_command("run", recipe, sent=sent) if real else start(recipe, sent=sent)
        told = end.last_line.startswith(f"seekr-peft: stopped by {signal.Signals(number).name}; ")
        if end.code == 128 + number and told and "Traceback" not in end.err:
            if run.exists() and (run / "recipe.yaml").exists() and f"{run / 'recipe.yaml'} --resume" not in end.err:
                return Outcome(UNNAMED, str(end))
        elif end.code != 0 or "Traceback" in end.err:
            return Outcome(TRACEBACK, str(end))
        return ended_alike(go_on(recipe), run, reference)

    return act


# A full disk --------------------------------------------------------------------------------------------------------


def disk(bench: Bench, seed: int) -> Iterator[Case]:
    """The disk is full, in bytes and in files, or files may not be longer; with room the run goes on."""
    draw = random.Random(seed)
    size = sum(path.stat().st_size for path in bench.reference("saving").rglob("*") if path.is_file())
    n_files = sum(1 for _ in bench.reference("saving").rglob("*"))
    for variant in ("seekr", "saving"):
        reference = bench.reference(variant)
        for _ in range(8):
            n_bytes = draw.randrange(4096, size)
            if _can_mount():
                yield Case(f"{variant}: a disk of {n_bytes} bytes", _full(reference, variant, f"size={n_bytes}"))
            yield Case(f"{variant}: files of {n_bytes // 8} bytes", _limited(reference, variant, n_bytes // 8))
        for _ in range(4):
            n_entries = draw.randrange(2, n_files)
            if _can_mount():
                act = _full(reference, variant, f"nr_inodes={n_entries}")
                yield Case(f"{variant}: a disk of {n_entries} files", act)


def _can_mount() -> bool:
    return os.geteuid() == 0 and Path("/proc/self/ns/mnt").exists()


_NEW_MOUNTS, _PRIVATE, _REMOUNT = 0x00020000, (1 << 18) | (1 << 14), 32


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    if library.mount(*texts, ctypes.c_ulong(flags), None if options is None else options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {target}")


def _full(reference: Path, variant: str, options: str) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        # Seen by this process and its own alone, and gone with it.
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS) != 0:
            raise OSError(ctypes.get_errno(), "cannot have mounts of its own")
        _mount(None, "/", None, _PRIVATE, None)
        recipe, run = write_recipe(folder, variant), folder / "run"
        run.mkdir()
        _mount("none", str(run), "tmpfs", 0, options)
        end = start(recipe)
        _mount("none", str(run), "tmpfs", _REMOUNT, "size=1g,nr_inodes=100000")
        return _went_on(end, recipe, reference)

    return act


def _limited(reference: Path, variant: str, n_bytes: int) -> Callable[[Path], Outcome]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    def act(folder: Path) -> Outcome:
        recipe = write_recipe(folder, variant)
        return _went_on(start(recipe, prepare=limit), recipe, reference)

    return act


def _went_on(end: End, recipe: Path, reference: Path) -> Outcome:
    if end.failed or (end.code == 2 and not end.refused):
        return Outcome(TRACEBACK, str(end))
    found = ended_alike(go_on(recipe), recipe.parent / "run", reference)
    return Outcome(found.kind, f"after {end}, with room: {found.detail}")


# What may not be written or read -------------------------------------------------------------------------------------


def rights(bench: Bench, seed: int) -> Iterator[Case]:
    """A folder that may not be written, files and folders that may not be read, for a user who has no privileges."""
    for label, run in (("finished", bench.reference("seekr")), ("interrupted", bench.interrupted("seekr", EVALUATING))):
        for what in ("run", "resume", "export", "report", "page", "inspect", "verify"):
            yield Case(f"read-only, {label}: {what}", _without_rights(run, what, _read_only, "run"))
        entries = ["", *(path.relative_to(run).as_posix() for path in sorted(run.rglob("*")))]
        for name in entries:
            for what in ("resume", "export", "report", "inspect", "verify"):
                act = _without_rights(run, what, _unreadable(name), Path(name).name or "run")
                yield Case(f"unreadable, {label}: {name or 'all'}: {what}", act)
        for name in [name for name in entries if (run / name).is_dir()]:
            act = _without_rights(run, "resume", _read_only_part(name), Path(name).name or "run")
            yield Case(f"read-only part, {label}: {name or 'all'}: resume", act)


def _read_only(run: Path) -> None:
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def _unreadable(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        _writable(run)
        (run / name).chmod(0)

    return change


def _read_only_part(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        _writable(run)
        (run / name).chmod(0o555)

    return change


def _writable(run: Path) -> None:
    for path in [run, *run.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)


def without_privileges() -> None:
    """Give up what root may do with files whatever their modes. The user stays the same: another one might not be let
    at Python's own library."""
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the privileges of root")


_CAPABILITIES_VERSION_3 = 0x20080522


_DOING: dict[str, Callable[..., End]] = {
    **READINGS,
    "run": lambda run, **options: start(run.parent / "recipe.yaml", **options),
    "resume": lambda run, **options: start(run.parent / "recipe.yaml", "--resume", **options),
    "page": lambda run, **options: command("report", run, **options),
}


def _without_rights(run: Path, what: str, change: Callable[[Path], None], name: str) -> Callable[[Path], Outcome]:
    def act(folder: Path) -> Outcome:
        ours = copied(run, folder, "seekr")
        folder.chmod(0o777)
        change(ours)
        end = _DOING[what](ours, prepare=without_privileges)
        if end.failed:
            return Outcome(TRACEBACK, str(end))
        if end.refused and (name in end.err or str(ours) in end.err):
            return Outcome(REFUSED)
        if what in ("run", "resume") and end.code == 0:
            return _as_with_all_rights(ours, run, what)
        wanted = _of_the_whole(_DOING[what], ours, run)
        if (end.code, end.out) == (wanted.code, wanted.out) and (end.code == 0 or end.err == wanted.err):
            return Outcome(IDENTICAL)
        return Outcome(UNNAMED if end.code == 2 else DIFFERENT, f"{end}; with all rights {wanted}")

    return act


def _as_with_all_rights(ours: Path, run: Path, what: str) -> Outcome:
    whole = copied(run, ours.parent / "whole", "seekr")
    end = _DOING[what](whole)
    same = end.code == 0 and contents(ours) == contents(whole)
    return Outcome(IDENTICAL) if same else Outcome(DIFFERENT, f"not what it is with all rights: {end}")


FAMILIES: dict[str, Callable[[Bench, int], Iterator[Case]]] = {
    "kills": kills,
    "damage": damage,
    "checkpoint-kills": checkpoint_kills,
    "checkpoint-damage": checkpoint_damage,
    "signals": signals,
    "disk": disk,
    "rights": rights,
    "repair": repair,
}
USUAL = {"kills": 200, "damage": 300, "checkpoint-kills": 120, "checkpoint-damage": 60, "signals": 70, "rights": 250,
         "repair": 90}  # fmt: skip
"""How many cases of a family are tried where a number is not given; all of the others."""
