"""``ContinualMethod``: what the trainer and a run know of any method."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import SeekrConfig
from ..errors import ConfigError, RunError, shown
from ..files.atomic import checksum, partial_path, read_object, replacing_folder, scratch_folder
from ..files.manifest import (
    MANIFEST_FILE,
    TASKS_DIRECTORY,
    Ledger,
    StoredFiles,
    files_in,
    folder_damages,
    read_manifest,
    task_folder,
    task_number,
    write_manifest,
)
from ..files.manifest import METHOD_FILE as STATE_FILE
from ..files.paths import LONGEST_FOLDER_NAME, given_path, is_folder_name
from ..losses import ReplayTerms
from ..model.adapter_effect import probe_tokens, unchanged_outputs
from ..model.adapter_stack import AdapterStack, Mode
from ..model.devices import check_one_process
from ..model.facts import ModelFacts
from ..model.kind import base_fingerprint, check_model
from ..model.low_rank_sum import RankLimit
from ..tasks.inputs import check_rows
from .divergence import Moment, check_adapter
from .own_loop import GivenGradient, StepCounter

logger = logging.getLogger("seekr_peft")

ADOPTED_DIRECTORY = "adopted_adapter"
"""Where a trained adapter is kept that the model carried before the first task."""


class ContinualMethod:
    """Train one task after another on ``model`` and lose as little as possible.

    A method is used like this, by ``ContinualTrainer`` or by hand::

        with method.task(name, replay_from=train):      # adapters.begin, before_training
            method.start_training(total_steps, epochs)
            ... for each step: train on the new task; if method.replay_due(step):
                with method.replay_terms(model) as terms: terms.total.backward()
                                                        # on exit: after_training, save, freeze

    Subclasses override ``check_model``, ``before_training``, ``after_training``, ``replay_due``, ``replay_terms`` and
    ``penalty``. A hand-written loop adds ``penalty()`` to its loss once per optimiser step.

    Args:
        model: A PeftModel with one LoRA adapter, which serves as the template of the tasks' adapters.
        config: Every knob; defaults to ``SeekrConfig()``.
        directory: Where finished tasks are written (``tasks/NN-name/``); None uses a temporary directory that lives
            as long as this object: call ``save_pretrained`` to keep it.
        adapter_mode, rank_limit: See ``AdapterStack``.

    Raises:
        AdapterError: ``model`` is no PeftModel around a causal language model of text, or a weight of it is not finite.
    """

    name: ClassVar[str] = ""
    uses_replay: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    """Whether ``task`` needs the training set although nothing is replayed."""
    teacher_signals: ClassVar[tuple[str, ...]] = ()
    """What is stored of the teacher with each replay sample, unless the config says otherwise: attention, logits."""
    joint: ClassVar[bool] = False
    """Whether a run trains all tasks at once, as one."""
    adapter_modes: ClassVar[tuple[str, ...]] = ("stack", "continue")
    """Modes of the adapter stack in which the method means something."""

    def __init__(
        self,
        model: PeftModel,
        config: SeekrConfig | None = None,
        *,
        directory: str | Path | None = None,
        adapter_mode: Mode = "stack",
        rank_limit: RankLimit = "auto",
    ) -> None:
        if adapter_mode not in self.adapter_modes:
            raise ConfigError(
                f"method {self.name!r} needs adapter_mode {' or '.join(map(repr, self.adapter_modes))}, got "
                f"{adapter_mode!r}; in a recipe set adapter.mode."
            )
        self.model = model
        self.facts = ModelFacts.of(model)
        self.config = config or SeekrConfig()
        if isinstance(model, PeftModel):
            # The stack refuses anything else; what is refused here leaves the model as it was.
            self.check_model(model)
        self.stack = AdapterStack(model, adapter_mode, rank_limit)
        self.directory = Path(directory or tempfile.mkdtemp(prefix="seekr-peft-"))
        if directory is None:
            weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.ledger = Ledger(self.directory)
        self.task_names: list[str] = []
        self.manifest_sums: list[str] = []
        """Checksums of the finished tasks' manifests."""
        self.was_listed = True
        """Whether what was restored had manifests, so that it is what was written."""
        self.made_from: dict[str, Any] = {}
        """What else than the base and the earlier tasks the next task's manifest says that it was made from."""
        self._base: str | None = None
        self.current_task: str | None = None
        self.awaits_samples = False
        """Whether the open task still has to be told its training samples; see ``draw_from``."""
        self._training_set: Any = None
        self._drew = False
        self._n_replayed = 0
        self._steps = StepCounter(())

    # For subclasses ---------------------------------------------------------------------------------------------

    def check_model(self, model: PeftModel) -> None:
        """Refuse a model that the method cannot train; called before anything of it is touched."""
        check_model(model)

    def before_training(self, replay_from: Any) -> None:
        """Called when a task begins, after its adapter was made."""

    def after_training(self, directory: Path) -> None:
        """Called when a task has been trained; what belongs to the task is written into ``directory``."""

    def after_restore(self, directories: list[Path]) -> None:
        """Called when finished tasks were restored from disk."""

    def start_training(self, total_steps: int | None = None, epochs: float = 1.0) -> None:
        """Called when the length of the task's training is known (None: unknown)."""

    def replay_due(self, step: int) -> bool:
        """Whether optimiser step ``step`` of the task (from 0) has a replay batch."""
        return False

    @contextmanager
    def replay_terms(self, model: nn.Module) -> Iterator[ReplayTerms]:
        """The next replay batch's loss; ``backward`` must run inside the block (checkpointing recomputes there)."""
        raise NotImplementedError(f"method {self.name!r} has no replay")
        yield

    def place(self) -> dict[str, Any]:
        """Where in the current task's own random choices the training is, for a checkpoint: plain values."""
        return {"replayed": self._n_replayed}

    def go_to(self, place: dict[str, Any]) -> None:
        """Go on at what ``place`` said; called when the training has been started again."""
        self._n_replayed = place["replayed"]

    def penalty(self) -> Tensor | None:
        """A term on the adapter's parameters for every optimiser step, already weighted; None for none. Under gradient
        accumulation it is added once per optimiser step and, as ``replay_loss``, not divided."""
        return None

    # A task -----------------------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str, replay_from: Any = None, optimizer_steps: int | None = None) -> Iterator[ContinualMethod]:
        """Train task ``name`` inside the block; on exit it is scored, remembered, saved and frozen.

        Args:
            name: Also a folder name: letters, digits, ``.``, ``_``, ``-``; new in this sequence.
            replay_from: The task's tokenised training set, not packed. A trainer hands its own over where it is left
                out; in a hand-written loop methods with a replay memory need it.
            optimizer_steps: Length of the training, for a hand-written loop (``ContinualTrainer`` knows it).

        An exception inside the block drops the task's adapter; the earlier tasks stay as they were. So does a model
        whose outputs on a few tokens (of its training set, or random ones) are others once the task's adapter and the
        earlier ones are one: see ``model.adapter_effect`` for the tolerance.
        """
        self._check_name(name)
        if optimizer_steps is not None and optimizer_steps < 1:
            raise ConfigError(f"task {name!r}: optimizer_steps must be at least 1, or None, got {optimizer_steps!r}.")
        check_rows(replay_from, "replay_from")
        check_one_process()
        self._check_place(name)
        self.stack.begin()
        self.current_task = name
        self._n_replayed = 0
        self._training_set, self._drew = replay_from, False
        self.awaits_samples = replay_from is None and (self.uses_replay or self.needs_samples)
        self._steps = StepCounter(self.stack.parameters().values())
        try:
            with self._steps.counting(self._require_samples):
                if not self.awaits_samples:
                    self.before_training(replay_from)
                self.start_training(optimizer_steps)
                yield self
            self._require_samples()
            self._finish(name)
        except BaseException:
            if self.stack.current is not None:
                self.stack.abandon()
            raise
        finally:
            self.current_task = None
            self.awaits_samples = False
            self._training_set = None

    def draw_from(self, training_set: Any) -> None:
        """Take the task's samples from ``training_set`` where ``task`` was not told ``replay_from``.

        Trainers call this with the set that they train on, tokenised and not packed.
        """
        if training_set is None:
            return
        if self.awaits_samples:
            self.before_training(training_set)
            self.awaits_samples, self._drew = False, True
        elif self._drew and training_set is not self._training_set:
            logger.warning(
                "task %s: a second training set came after its samples had been drawn from the first one; to draw from "
                "both, pass them together as task(name, replay_from=...).",
                self.current_task,
            )
        if self._training_set is None:
            self._training_set = training_set

    def replay_loss(self, step: int | None = None) -> Tensor | None:
        """For a hand-written loop: call once per optimiser step; None when no replay is due, else a loss to add.

        The gradient is computed here and handed over by the returned scalar's backward, so that it is right under
        activation checkpointing wherever ``backward`` is called, and the two graphs never exist at the same time.

        It is added once per optimiser step, whole: under gradient accumulation it must not be divided. accelerate's
        ``accelerator.backward`` divides whatever it is given, so multiply by
        ``accelerator.gradient_accumulation_steps`` before (a warning says when a loss came back divided). Called for
        each micro-batch, it answers the first one alone: steps of any torch optimizer over the adapter are seen.

        Args:
            step: The optimiser step of this task, from 0, for a loop that accumulates and uses no torch optimizer.

        Raises:
            DivergenceError: The replay loss is no finite number.
        """
        if self.current_task is None:
            raise RunError("replay_loss() was called outside `with method.task(...)`; call it while a task is trained.")
        self._require_samples()
        step = self._steps.begun(step)
        if step is None or not self.replay_due(step):
            return None
        parameters = list(self.stack.parameters().values())
        with self.replay_terms(self.model) as terms:
            gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
        Moment(self.current_task, step).check_finite("replay loss", terms.total)
        kept = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        return GivenGradient.apply(
            terms.total.detach(), self._steps.weighed, [g for _, g in kept], *[p for p, _ in kept]
        )

    # Files ------------------------------------------------------------------------------------------------------

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
            self._check_same_sequence(target)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{target} cannot be made ({error.strerror}); choose another folder.") from error
        ledger = Ledger(target)
        if elsewhere:
            self._copy_to(ledger)
        self._write_state(ledger)
        self.export("adapter", ledger)
        ledger.settle()

    def export(self, name: str, ledger: Ledger | None = None) -> None:
        """Write the consolidated adapter (all finished tasks) as a plain PEFT adapter into folder ``name`` of the
        method's directory, or of another one's ``ledger``."""
        ledger = ledger or self.ledger
        folder = ledger.directory / name
        written = partial_path(folder)
        shutil.rmtree(written, ignore_errors=True)
        self.stack.export(written)
        files = files_in(written)
        ledger.announce({f"{name}/{file}": checksum(written / file) for file in files})
        folder.mkdir(exist_ok=True)
        for file in files:
            os.replace(written / file, folder / file)
        written.rmdir()

    def _copy_to(self, ledger: Ledger) -> None:
        """Copy what the method has written into another directory; a kill in between leaves that one whole."""
        for index, name in enumerate(self.task_names):
            source, target = self.task_directory(index, name), task_folder(ledger.directory, index, name)
            if next(folder_damages(target, self.manifest_sums[index]), None) is not None:
                with replacing_folder(target) as temporary:
                    shutil.copytree(source, temporary, dirs_exist_ok=True)
        for name in self._listed():
            (ledger.directory / name).parent.mkdir(parents=True, exist_ok=True)
            with ledger.replacing(name) as temporary:
                shutil.copyfile(self.directory / name, temporary)

    def _listed(self) -> list[str]:
        """Names of the files beside ``tasks/`` that were written here, but for those that are written anew."""
        files, announced = self.ledger.read()
        names = [name for name in {**files, **announced} if (self.directory / name).is_file()]
        return [name for name in names if name != STATE_FILE and not name.startswith("adapter/")]

    def _check_same_sequence(self, target: Path) -> None:
        """RunError where ``target`` holds other tasks than the first ones of this method."""
        state = read_method_state(target)
        there, sums = state["tasks"], state.get("manifests")
        names = ", ".join(map(str, there))
        if there[: len(self.task_names)] == self.task_names and len(there) > len(self.task_names):
            raise RunError(
                f"{target} holds the tasks {names}, more than the {len(self.task_names)} of this method; choose "
                f"another folder, or delete it."
            )
        same = there == self.task_names[: len(there)] and (sums is None or sums == self.manifest_sums[: len(there)])
        if not same:
            raise RunError(
                f"{target} holds the tasks {names} of another sequence; choose another folder, or delete it."
            )

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
        method = cls(
            model,
            SeekrConfig.from_mapping(state["config"]),
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
        self._check_stored(directories, adopted)
        delete_unfinished(self.directory, len(names))
        self.stack.restore([path / "adapter" for path in directories], adopted if adopted.is_dir() else None)
        self.task_names = list(names)
        self.after_restore(directories)
        # Last, since others can say more exactly what does not fit.
        self._check_base(directories)

    def base_fingerprint(self) -> str:
        """What the model's base is known by in the manifests; see ``model_kind.base_fingerprint``."""
        if self._base is None:
            self._base = base_fingerprint(self.model)
        return self._base

    def _check_stored(self, directories: list[Path], adopted: Path) -> None:
        stored = StoredFiles(self.directory)
        stored.check(*(adopted / name for name in (files_in(adopted) if adopted.is_dir() else [])))
        folders = stored.task_folders()[: len(directories)]
        if not folders:
            # An earlier version wrote them; what is there now is what is checked from here on.
            self.was_listed = not directories
            # A folder that is only read has none.
            with suppress(OSError):
                for folder in directories:
                    self._write_manifest(folder, folder.name.partition("-")[2])
            return
        names = [folder.name for folder, _ in folders]
        if names != [folder.name for folder in directories]:
            wanted = ", ".join(folder.name for folder in directories)
            raise RunError(f"{stored.directory} holds the tasks {', '.join(names)}, not {wanted}; give its own tasks.")
        for folder, manifest_sum in folders:
            for damage in folder_damages(folder, manifest_sum):
                raise damage.error(self.directory)
            self.manifest_sums.append(manifest_sum)

    def _check_base(self, directories: list[Path]) -> None:
        for folder in directories if self.was_listed else []:
            if read_manifest(folder)["made_from"].get("base") != self.base_fingerprint():
                raise RunError(
                    f"{folder} was trained over another base model than this one (or in another dtype or "
                    f"quantization); load the one that it was trained over."
                )

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

    def _finish(self, name: str) -> None:
        check_adapter(self.stack.parameters(), name)
        if not self.stack.has_learnt():
            logger.warning(
                "task %s: its adapter is what it was at the beginning, so nothing was learnt; check the learning rate, "
                "the number of steps, and that nothing loaded other weights into it.",
                name,
            )
        self.stack.check_frozen_unchanged()
        if self.uses_replay and self.task_names and not self._n_replayed:
            logger.warning(
                "task %s: no replay batch was used while it was trained, so the earlier tasks are forgotten; in a "
                "hand-written loop pass optimizer_steps to task() and call replay_loss() once per step.",
                name,
            )
        target = self.task_directory(len(self.task_names), name)
        with replacing_folder(target) as partial:
            self.after_training(partial)
            self.stack.save_current(partial / "adapter")
            if self.stack.adopted and not self.task_names:
                self.export(ADOPTED_DIRECTORY)
            made_before = list(self.manifest_sums)
            self._write_manifest(partial, name)
            # What may still fail comes before the task counts as finished, so that it can be dropped as a whole.
            rows = probe_tokens(self._training_set, self._vocabulary())
            try:
                consolidation = self.stack.finish(unchanged_outputs(self.model, rows, f"task {name!r}"))
            except BaseException:
                self.manifest_sums = made_before
                raise
        self.task_names.append(name)
        self.after_saving(target)
        if consolidation and consolidation.discarded_energy > 0:
            logger.warning(
                "task %s: the earlier adapters were cut to rank %d, which discards %.3g of their squared singular "
                "values (%.3g in the worst module); raise rank_limit to keep more.",
                name,
                consolidation.rank,
                consolidation.discarded_energy,
                consolidation.worst_module_energy,
            )
        self._write_state(self.ledger)

    def _vocabulary(self) -> int:
        return int(self.facts.input_embeddings.num_embeddings)

    def after_saving(self, directory: Path) -> None:
        """Called when the task's directory is in its final place."""

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

    def _require_samples(self) -> None:
        """ConfigError when the task trains without having been told its samples."""
        if self.awaits_samples:
            what = "keeps a replay memory" if self.uses_replay else "looks at the training samples"
            raise ConfigError(
                f"task {self.current_task!r}: method {self.name!r} {what}, so pass replay_from=<tokenised training "
                f"set> to task(), or train with ContinualTrainer, which hands its own over."
            )

    def _check_place(self, name: str) -> None:
        """RunError, before anything is trained, where the task's folder cannot be written inside of the directory."""
        if not self.task_names and (self.directory / STATE_FILE).is_file():
            there = read_method_state(self.directory)["tasks"]
            if there:
                raise RunError(
                    f"{self.directory} holds the tasks {', '.join(map(str, there))} already, which this method would "
                    f"write over; go on with {type(self).__name__}.from_pretrained(model, directory), or "
                    f"choose another."
                )
        target = self.task_directory(len(self.task_names), name)
        for path in (target.parent, target):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise RunError(f"{path} is in the way (a link or a file); move it away, the task is written there.")
        try:
            # Its own folder is only made with the first task.
            with scratch_folder(target.parent if target.parent.is_dir() else self._made(self.directory)):
                pass
        except OSError as error:
            raise RunError(
                f"{target.parent} cannot be written ({error.strerror}), where task {name!r} would be kept; give the "
                f"method another directory, or mend that."
            ) from error

    def _made(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_name(self, name: str) -> None:
        if not is_folder_name(name):
            raise ConfigError(
                f"task name {shown(name)} must be a folder name of letters, digits, '.', '_' and '-', "
                f"{LONGEST_FOLDER_NAME} at most, starting with a letter or digit."
            )
        if name in self.task_names:
            raise ConfigError(f"task name {name!r} is already used in this sequence; give each task its own name.")
        if self.current_task is not None:
            raise RunError(f"task {self.current_task!r} is still open; tasks cannot be nested.")


def delete_unfinished(directory: Path, n_tasks: int) -> None:
    """Delete what a kill between a task's own folder and the list of the ``n_tasks`` finished ones has left."""
    tasks = directory / TASKS_DIRECTORY
    for path in sorted(tasks.iterdir()) if tasks.is_dir() else []:
        if task_number(path.name.removeprefix(".")) == n_tasks + 1 and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def read_method_state(directory: Path) -> dict[str, Any]:
    """Read ``method.json``; RunError when it is missing, broken, or not what was written."""
    path = directory / STATE_FILE
    StoredFiles(directory).check(path)
    state = read_object(path, "save_pretrained writes it")
    if not isinstance(state.get("tasks"), list):
        raise RunError(f"{path} is broken (it lists no tasks); restore it, or start again in another directory.")
    return state
