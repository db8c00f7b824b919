"""``ContinualMethod``: what the trainer and a run know of any method."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn

from ..config import MethodConfig
from ..errors import ConfigError, RunError
from ..files.atomic import replacing_folder
from ..files.manifest import Ledger
from ..losses import ReplayTerms
from ..model.adapter_effect import probe_tokens, unchanged_outputs
from ..model.adapter_stack import AdapterStack, Mode
from ..model.devices import check_one_process
from ..model.facts import ModelFacts
from ..model.kind import check_model
from ..model.low_rank_sum import Consolidation, RankLimit
from ..tasks.inputs import check_rows
from .directory import check_folder_for, check_new_name
from .divergence import Moment, check_adapter
from .own_loop import StepCounter, with_given_gradient
from .saved import ADOPTED_DIRECTORY, SavedMethod
from .warnings import warn_of_a_cut, warn_of_a_training_without_effect, warn_of_a_training_without_replay

logger = logging.getLogger("seekr_peft")


class ContinualMethod(SavedMethod):
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
        config: Every knob, as of ``config_class``; None for its defaults. A ``SeekrConfig`` is taken by every
            method, for what the two share.
        directory: Where finished tasks are written (``tasks/NN-name/``); None uses a temporary directory that lives
            as long as this object: call ``save_pretrained`` to keep it.
        adapter_mode, rank_limit: See ``AdapterStack``.

    Raises:
        AdapterError: ``model`` is no PeftModel around a causal language model of text, or a weight of it is not finite.
    """

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
        config: MethodConfig | None = None,
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
        self.config = self.config_class.of(config)
        if isinstance(model, PeftModel):
            # The stack refuses anything else; what is refused here leaves the model as it was.
            self.check_model(model)
        self.stack = AdapterStack(model, adapter_mode, rank_limit)
        self.directory = Path(directory or tempfile.mkdtemp(prefix="seekr-peft-"))
        if directory is None:
            weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.ledger = Ledger(self.directory)
        self.task_names = []
        self.manifest_sums = []
        self.was_listed = True
        self.made_from = {}
        self.current_task = None
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

    @property
    def replays_separately(self) -> bool:
        """Whether the replay loss has an optimiser step of its own."""
        return getattr(self.config, "replay_step", "added") == "separate"

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
        if self.current_task is not None:
            raise RunError(f"task {self.current_task!r} is still open; tasks cannot be nested.")
        check_new_name(name, self.task_names)
        if optimizer_steps is not None and optimizer_steps < 1:
            raise ConfigError(f"task {name!r}: optimizer_steps must be at least 1, or None, got {optimizer_steps!r}.")
        check_rows(replay_from, "replay_from")
        check_one_process()
        check_folder_for(self.directory, len(self.task_names), name, type(self).__name__)
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
        with self.replay_terms(self.model) as terms:
            loss = with_given_gradient(terms.total, self.stack.parameters().values(), self._steps.weighed)
        Moment(self.current_task, step).check_finite("replay loss", loss)
        return loss

    def _finish(self, name: str) -> None:
        check_adapter(self.stack.parameters(), name)
        warn_of_a_training_without_effect(name, self.stack.has_learnt())
        if self.uses_replay and self.task_names:
            warn_of_a_training_without_replay(name, self._n_replayed)
        self.stack.check_frozen_unchanged()
        target = self.task_directory(len(self.task_names), name)
        with replacing_folder(target) as partial:
            self.after_training(partial)
            self.stack.save_current(partial / "adapter")
            if self.stack.adopted and not self.task_names:
                self.export(ADOPTED_DIRECTORY)
            consolidation = self._consolidate(partial, name)
        self.task_names.append(name)
        self.after_saving(target)
        if consolidation:
            warn_of_a_cut(name, consolidation)
        self._write_state(self.ledger)

    def _consolidate(self, partial: Path, name: str) -> Consolidation | None:
        """Make the task's adapter one with the earlier ones, once its manifest is in its folder."""
        made_before = list(self.manifest_sums)
        self._write_manifest(partial, name)
        # What may still fail comes before the task counts as finished, so that it can be dropped as a whole.
        rows = probe_tokens(self._training_set, self._vocabulary())
        try:
            return self.stack.finish(unchanged_outputs(self.model, rows, f"task {name!r}"))
        except BaseException:
            self.manifest_sums = made_before
            raise

    def _vocabulary(self) -> int:
        return int(self.facts.input_embeddings.num_embeddings)

    def after_saving(self, directory: Path) -> None:
        """Called when the task's directory is in its final place."""

    def _require_samples(self) -> None:
        """ConfigError when the task trains without having been told its samples."""
        if self.awaits_samples:
            what = "keeps a replay memory" if self.uses_replay else "looks at the training samples"
            raise ConfigError(
                f"task {self.current_task!r}: method {self.name!r} {what}, so pass replay_from=<tokenised training "
                f"set> to task(), or train with ContinualTrainer, which hands its own over."
            )
