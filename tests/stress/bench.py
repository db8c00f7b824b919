"""Reference runs, and whether what another one leaves behind has the same bytes."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from support.small_run import small_recipe

from .operations import kill_self, watch
from .process import End, command

_TRAINING = {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "seekr": {},
    "saving": {"training": {**_TRAINING, "save_strategy": "steps", "save_steps": 2}},
    "ewc": {"method": {"name": "ewc"}, "adapter": {"r": 4, "lora_alpha": 8, "mode": "continue"}},
    "lwf": {"method": {"name": "lwf"}, "training": {**_TRAINING, "save_strategy": "steps", "save_steps": 3}},
    "multitask": {"method": {"name": "multitask"}},
    "other seed": {"seed": 1},
}
"""Recipes of two tasks: the method itself; with checkpoints inside a task; a method with one adapter for all; one with
a teacher of its own; all tasks at once; and other numbers."""

_MAY_DIFFER = {
    "environment.json": "seconds and the command",
    "costs.json": "seconds",
    "report.html": "shows both",
    ".lock": "is empty",
    "manifest.json": "lists the checksums of those",
}
"""Files of a run that need not have the same bytes, and why. They must be there; the manifest must verify."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case: one of ``OUTCOMES``, and what was seen."""

    kind: str
    detail: str = ""


IDENTICAL, REFUSED, UNNAMED, TRACEBACK, DIFFERENT = OUTCOMES = (
    "identical", "refused by name", "refused without a name", "tracebacks", "accepted and different",
)  # fmt: skip
BAD = (UNNAMED, TRACEBACK, DIFFERENT)


@dataclass
class Bench:
    """A ``folder`` with the reference runs of all variants, each made once."""

    folder: Path
    _operations: dict[str, list[str]] = field(default_factory=dict)

    def reference(self, variant: str) -> Path:
        """A run that nothing disturbed; its operations are counted."""
        run = self.folder / variant / "run"
        if variant not in self._operations:
            log = self.folder / f"{variant}.log"
            end = start(write_recipe(run.parent, variant), prepare=lambda: watch(run, _writer(log)))
            if end.code != 0:
                raise RuntimeError(f"the undisturbed run of {variant} failed: {end}")
            self._operations[variant] = log.read_text(encoding="utf-8").splitlines()
        return run

    def operations(self, variant: str) -> list[str]:
        """All that the reference run did to files, in order."""
        self.reference(variant)
        return self._operations[variant]

    def interrupted(self, variant: str, before: str) -> Path:
        """The same run, killed before the last operation whose text ends with ``before``."""
        at = max(number for number, text in enumerate(self.operations(variant)) if text.endswith(before))
        run = self.folder / f"{variant}-{at}" / "run"
        if not run.exists():
            start(write_recipe(run.parent, variant), prepare=lambda: watch(run, kill_self(at)))
        return run


def _writer(log: Path) -> Any:
    file = log.open("a", encoding="utf-8", buffering=1)
    return lambda number, text: file.write(f"{text}\n")


def write_recipe(folder: Path, variant: str) -> Path:
    """The recipe of a ``variant``, whose run is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(folder / "run", n_tasks=2, **VARIANTS[variant])), encoding="utf-8")
    return path


def copied(run: Path, folder: Path, variant: str) -> Path:
    """A copy of a run in ``folder``, with its recipe beside it."""
    write_recipe(folder, variant)
    shutil.copytree(run, folder / "run", symlinks=True)
    return folder / "run"


def start(recipe: Path, *arguments: str, **options: Any) -> End:
    """``seekr-peft run RECIPE``."""
    return command("run", recipe, *arguments, **options)


def go_on(recipe: Path, **options: Any) -> End:
    """``--resume``; or the run anew, where that says that nothing was begun."""
    end = start(recipe, "--resume", **options)
    return start(recipe, **options) if end.code == 2 and "start it without --resume" in end.err else end


def differences(run: Path, reference: Path) -> list[str]:
    """Names of files that ``run`` has and the ``reference`` has not, or the other way round, or with other bytes."""
    ours, theirs = contents(run), contents(reference)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def contents(run: Path) -> dict[str, str]:
    """A checksum of every file of a run by its name, without what may differ."""
    return {path.relative_to(run).as_posix(): _content(path, run) for path in run.rglob("*") if not path.is_dir()}


def _content(path: Path, run: Path) -> str:
    if path.relative_to(run).as_posix() in _MAY_DIFFER:
        return "there"
    try:
        content = path.read_bytes()
    except OSError as error:
        return str(error.strerror)
    if path.name == "recipe.yaml":
        # The one setting in which the recipes of two runs differ.
        content = re.sub(rb"(?m)^output_dir: .*\n(  .*\n)*", b"", content)
    return hashlib.sha256(content).hexdigest()


def ended_alike(end: End, run: Path, reference: Path, name: str = "run") -> Outcome:
    """What became of a run that was to end as ``reference`` did. ``name``: what a refusal has to name."""
    if end.failed:
        return Outcome(TRACEBACK, str(end))
    if end.code == 2:
        return refusal(end, name)
    found = differences(run, reference)
    if found:
        return Outcome(DIFFERENT, f"other files than the reference: {', '.join(found[:8])}")
    verified = command("inspect", run, "--verify")
    return Outcome(IDENTICAL) if verified.code == 0 else Outcome(DIFFERENT, f"does not verify: {verified}")


def refusal(end: End, name: str) -> Outcome:
    """Whether a command that ended with status 2 names what is wrong."""
    named = end.refused and name in end.err
    return Outcome(REFUSED if named else UNNAMED, str(end))
