"""What of a method is on disk: its finished tasks, the state that it goes on from, the consolidated adapter."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel

from ..config import MethodConfig, SeekrConfig
from ..errors import RunError
from ..files.atomic import checksum, partial_path
from ..files.manifest import MANIFEST_FILE, Ledger, task_folder, write_manifest
from ..files.manifest import METHOD_FILE as STATE_FILE
from ..files.paths import given_path
from ..model.adapter_stack import AdapterStack
from ..model.kind import base_fingerprint
from .directory import (
    check_base,
    check_same_sequence,
    check_stored_tasks,
    copy_tasks,
    delete_unfinished,
    place_folder,
    read_method_state,
)
from .registry import OWN_CONFIGS

ADOPTED_DIRECTORY = "adopted_adapter"
"""Where a trained adapter is kept that the model carried before the first task."""


class SavedMethod:
    """The part of a method that writes its tasks and goes on from them; ``ContinualMethod`` is the rest."""

    name: ClassVar[str] = ""
    config_class: ClassVar[type[MethodConfig]] = SeekrConfig
    """The method's knobs; a recipe's ``method`` section is checked against it."""

    model: PeftModel
    config: MethodConfig
    stack: AdapterStack
    directory: Path
    ledger: Ledger
    task_names: list[str]
    manifest_sums: list[str]
    """Checksums of the finished tasks' manifests."""
    was_listed: bool
    """Whether what was restored had manifests, so that it is what was written."""
    made_from: dict[str, Any]
    """What else than the base and the earlier tasks the next task's manifest says that it was made from."""
    current_task: str | None
    _base: str | None = None

    def after_restore(self, directories: list[Path]) -> None:
        """Called when finished tasks were restored from disk."""

    def base_fingerprint(self) -> str:
        """What the model's base is known by in the manifests; see ``model.kind.base_fingerprint``."""
        if self._base is None:
            self._base = base_fingerprint(self.model)
        return self._base

    def task_directory(self, index: int, name: str) -> Path:
        """``tasks/NN-name`` of the ``index``-th task (from 0)."""
        return task_folder(self.directory, index, name)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write everything that ``from_pretrained`` needs, and ``adapter/``, the consolidated plain PEFT adapter.

        Raises:
            RunError: ``directory`` holds another sequence of tasks.
        """
        target = given_path(directory, "the folder to save into")
        elsewhere = target.resolve() != self.directory.resolve()
        if (target / STATE_FILE).is_file() and elsewhere:
            check_same_sequence(target, self.task_names, self.manifest_sums)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{target} cannot be made ({error.strerror}); choose another folder.") from error
        ledger = Ledger(target)
        if elsewhere:
            copy_tasks(self.ledger, ledger, self.task_names, self.manifest_sums)
        self._write_state(ledger)
        self.export("adapter", ledger)
        ledger.settle()

    def export(self, name: str, ledger: Ledger | None = None) -> None:
        """Write the consolidated adapter (all finished tasks) as a plain PEFT adapter into folder ``name`` of the
        method's directory, or of another one's ``ledger``."""
        ledger = ledger or self.ledger
        written = partial_path(ledger.directory / name)
        shutil.rmtree(written, ignore_errors=True)
        self.stack.export(written)
        place_folder(written, ledger, name)

    @classmethod
    def from_pretrained(cls, model: PeftModel, directory: str | Path) -> Any:
        """Go on from ``save_pretrained``, on a fresh PeftModel over the same base; later tasks are written there too.

        Raises:
            RunError: The directory is missing, incomplete, of another method, trained over another base, or a file
                of it is not what was written.
        """
        state = read_method_state(given_path(directory, "the saved method"))
        if state["method"] != cls.name:
            raise RunError(
                f"{directory} was written by method {state['method']!r}, not {cls.name!r}; load it with that method."
            )
        make: Any = cls
        method = make(
            model,
            # An earlier version kept the settings of all methods.
            cls.config_class.from_mapping(state["config"], OWN_CONFIGS.values()),
            directory=directory,
            adapter_mode=state["adapter_mode"],
            rank_limit=state["rank_limit"],
        )
        method.restore(state["tasks"])
        return method

    def restore(self, names: list[str]) -> None:
        """Rebuild adapters and memory after the finished tasks ``names`` from ``directory``. What a kill left of the
        task after them is deleted.

        Raises:
            RunError: A file is not what was written, or the tasks were trained over another base.
        """
        directories = [self.task_directory(i, name) for i, name in enumerate(names)]
        adopted = self.directory / ADOPTED_DIRECTORY
        sums = check_stored_tasks(self.directory, directories, adopted)
        if sums is None:
            # An earlier version wrote them; what is there now is what is checked from here on.
            self.was_listed = not directories
            # A folder that is only read has none.
            with suppress(OSError):
                for folder in directories:
                    self._write_manifest(folder, folder.name.partition("-")[2])
        else:
            self.manifest_sums += sums
        delete_unfinished(self.directory, len(names))
        self.stack.restore([path / "adapter" for path in directories], adopted if adopted.is_dir() else None)
        self.task_names = list(names)
        self.after_restore(directories)
        if self.was_listed:
            # Last, since others can say more exactly what does not fit.
            check_base(directories, self.base_fingerprint())

    def task_made_from(self) -> dict[str, Any]:
        """What the task in progress is made from: its name, the base, the earlier tasks."""
        return {
            "task": self.current_task,
            "base": self.base_fingerprint(),
            **self.made_from,
            "earlier": list(self.manifest_sums),
        }

    def _write_manifest(self, folder: Path, name: str) -> None:
        write_manifest(folder, name, {**self.task_made_from(), "task": name, "method": self._description()})
        self.manifest_sums.append(checksum(folder / MANIFEST_FILE))

    def _write_state(self, ledger: Ledger) -> None:
        ledger.write_json(
            STATE_FILE, {**self._description(), "tasks": self.task_names, "manifests": self.manifest_sums}
        )

    def _description(self) -> dict[str, Any]:
        """What ``from_pretrained`` makes a method like this one from."""
        return {
            "method": self.name,
            "config": self.config.to_dict(),
            "adapter_mode": self.stack.mode,
            "rank_limit": self.stack.rank_limit,
        }
