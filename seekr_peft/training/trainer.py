"""``ContinualTrainer``: a transformers Trainer whose steps also replay.

Thin on purpose: the mixin decides only *when* the method's replay loss joins, so it sits on any Trainer subclass."""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import AdapterError, ConfigError, DataError, DivergenceError
from ..loss_names import PENALTY, logged_name
from ..methods import ContinualMethod
from ..methods.divergence import Moment
from ..model.devices import check_one_gpu, check_one_process
from ..model.facts import ModelFacts
from ..tasks.inputs import check_batch, check_data_set
from ..tasks.tokenize import IGNORED_LABEL
from .checkpoint_mixin import CheckpointMixin
from .training_data import (
    Collated,
    answer_collator,
    check_labelled,
    check_tokenised,
)

logger = logging.getLogger("seekr_peft")


MOST_SKIPPED_STEPS = 30
"""Under fp16 accelerate's gradient scaler skips a step whose gradient overflowed and halves its scale. After so many
in a row a scale of 65536 is below 1e-4: it is not the scale that overflows."""


class ContinualTrainerMixin(CheckpointMixin):
    """Adds ``method=`` to a ``Trainer`` subclass (put the mixin first) that trains on ``input_ids`` and ``labels``; not
    to one with a loss of its own over other columns, such as TRL's ``DPOTrainer``.

    One new-task optimiser step, with gradient accumulation over g micro-batches::

        micro-batch 1 .. g     the Trainer's own forward and backward
        after the last one     if method.replay_due(step): replay forward and backward, gradients added
        optimizer.step()       clips and applies both                        (config.replay_step == "added")
        then                   or the replay loss in a step of its own       ("separate")
        lr_scheduler.step()

    The replay loss is added exactly once per optimiser step, so it needs no division by the accumulation steps,
    whatever the Trainer does with ``num_items_in_batch``. Its forward and backward run inside the method's block,
    apart from the new task's graph: the peak memory is the larger of the two, and activation checkpointing works.

    Every loss term is logged apart: ``loss`` (the new task), and ``NAME_loss`` of each that the method has, such as
    ``replay_loss``, ``logits_loss`` and ``attention_loss``.

    ``save_strategy`` keeps checkpoints inside a task, ``output_dir/checkpoint-STEP``, as safetensors and JSON: the
    task's own adapter, optimizer, scheduler, random numbers and the place in the replay stream. Inside ``method.task``
    of the same task ``train(resume_from_checkpoint=True)`` goes on from the latest of them and ends bit for bit like a
    training that was not stopped. ``load_best_model_at_end`` brings back the task's own adapter as it was at the best
    checkpoint. A task whose ``replay_from`` was left out gets its replay samples from the training set.

    Raises:
        ConfigError: Several processes or GPUs, a ``model_init``, a ``peft_config``, a checkpoint of another task.
        RunError: A checkpoint is damaged.
        DivergenceError: From ``train``, at the first loss or gradient norm that is infinite or no number.
        AdapterError: Outside of a task, or with another model than the method's.
    """

    def __init__(self, *args: Any, method: ContinualMethod, **kwargs: Any) -> None:
        if method.current_task is None:
            raise AdapterError(
                "ContinualTrainer was made outside of a task; make and run it inside `with method.task(name, ...)`."
            )
        for name in ("model_init", "peft_config"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} was given to the trainer, which would train another model than the method's; pass the "
                    f"method's own, model=method.model, and no {name}."
                )
        super().__init__(*args, **kwargs)
        check_one_process(self.args.world_size)  # type: ignore[attr-defined]
        check_one_gpu(self.args.n_gpu)  # type: ignore[attr-defined]
        if self.model is not method.model:  # type: ignore[attr-defined,has-type]
            raise AdapterError(
                "the trainer's model is not the one that the method was made with; pass model=method.model."
            )
        self.method = method
        method.draw_from(self.samples_to_draw_from())
        self._input_names = method.facts.input_names
        self._skipped_steps = 0
        self._last_loss: Tensor | float = 0.0
        self._separate = method.replays_separately
        self._term_sums: dict[str, Tensor] = {}
        self._term_counts: dict[str, int] = {}
        self._epoch_began: dict[str, Any] = {}
        """The random numbers' state when the epoch began: the order of its samples is drawn from there."""
        self._n_passes = 0
        """Through the training set, by this call of ``train``."""
        self._samples_digest: str | None = None
        self._goes_on_from: dict[str, Any] | None = None
        if self.args.dataloader_persistent_workers:  # type: ignore[attr-defined]
            # They draw from a state that lives in their processes alone, which no checkpoint can hold.
            self.args.dataloader_persistent_workers = False  # type: ignore[attr-defined]
            logger.warning("dataloader_persistent_workers is switched off, so that a checkpoint can be gone on with.")
        self.add_callback(_ReplayCallback(self))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As in Trainer.

        Args:
            resume_from_checkpoint: A checkpoint of the task in progress; True: the latest in ``output_dir``.
            kwargs: As in Trainer.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        forget_preparation(self.method.model)
        try:
            self._n_passes = 0
            self._goes_on_from = None if checkpoint is None else self._loaded(checkpoint)
            return super().train(None if checkpoint is None else str(checkpoint), **kwargs)  # type: ignore[misc]
        finally:
            self._goes_on_from = None
            self._leave_the_model_as_it_is_asked()

    def _leave_the_model_as_it_is_asked(self) -> None:
        """Without what only a training needs, however it ended."""
        # transformers removes NEFTune's noise from the embeddings only after a training that came to its end.
        noise = getattr(self, "neftune_hook_handle", None)
        if noise is not None:
            noise.remove()
        # A schedule-free optimizer evaluates at other weights than it trains.
        evaluate = getattr(_plain(self.optimizer), "eval", None)  # type: ignore[attr-defined]
        if callable(evaluate):
            evaluate()

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: each trial would start from another model than the method's."""
        raise ConfigError(
            "hyperparameter_search() makes a new model for each trial, past the method's adapters; try settings in "
            "runs of their own, as seekr-peft compare does."
        )

    def samples_to_draw_from(self) -> Any:
        """The training set, one sample a row, which the method draws its replay samples from."""
        return self.train_dataset  # type: ignore[attr-defined]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step, and on the last micro-batch the replay loss that is due."""
        if self.method.uses_replay or self.method.needs_samples:
            check_batch(inputs, self._input_names)
        labels = inputs.get("labels")
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        last_micro_batch = self.accelerator.sync_gradients  # type: ignore[attr-defined]
        step = self.state.global_step  # type: ignore[attr-defined]
        if last_micro_batch and not self._separate and self.method.replay_due(step):
            self._replay_backward(model)
        if last_micro_batch:
            self._penalty_backward()
        # Last, so that the device is not waited for before it has all its work.
        try:
            self._moment().check_finite("loss", loss)
        except DivergenceError:
            if isinstance(labels, Tensor) and bool((labels == IGNORED_LABEL).all()):
                raise DataError(
                    f"no token of the batch at step {step + 1} has a label (all are {IGNORED_LABEL}), so its loss is "
                    f"no number; leave out samples without an answer, or raise max_length."
                ) from None
            raise
        self._last_loss = loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each replay term since the last log."""
        if "loss" in logs:
            for name, total in self._term_sums.items():
                logs[name] = round(float(total) / self._term_counts[name], 6)
            self._term_sums, self._term_counts = {}, {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def replay_step(self, model: nn.Module) -> None:
        """One optimiser step on a replay batch alone, at the new task's learning rate; leaves no gradient behind."""
        model.zero_grad()
        self._replay_backward(model)
        limit = self.args.max_grad_norm or float("inf")  # type: ignore[attr-defined]
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)  # type: ignore[attr-defined]
        self._check_gradient_norm(norm)
        self.optimizer.step()  # type: ignore[attr-defined]
        model.zero_grad()

    def _replay_backward(self, model: nn.Module) -> None:
        model.train()
        accelerator = self.accelerator  # type: ignore[attr-defined]
        with ExitStack() as open_until_backward:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                terms = open_until_backward.enter_context(self.method.replay_terms(model))
            # accelerate divides by its own accumulation steps; this loss is added once per optimiser step.
            accelerator.backward(terms.total * accelerator.gradient_accumulation_steps)
        self._last_loss = terms.total.detach()
        self._moment().check_finite("replay loss", self._last_loss)
        self._count(terms.values())

    def _penalty_backward(self) -> None:
        penalty = self.method.penalty()
        if penalty is not None:
            accelerator = self.accelerator  # type: ignore[attr-defined]
            accelerator.backward(penalty * accelerator.gradient_accumulation_steps)
            self._moment().check_finite("penalty", penalty)
            self._count({logged_name(PENALTY): penalty.detach()})

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # transformers 5.23: the only place that has the norm before clipping, at every optimiser step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._check_gradient_norm(norm)
        return norm

    def _check_gradient_norm(self, norm: Any) -> None:
        moment = self._moment()
        try:
            moment.check_finite("gradient norm", norm)
            moment.check_moving(norm, self._last_loss)
        except DivergenceError:
            self._skipped_steps += 1
            scaled = self.accelerator.scaler is not None  # type: ignore[attr-defined]
            if not scaled or self._skipped_steps > MOST_SKIPPED_STEPS:
                raise
        else:
            self._skipped_steps = 0

    def _moment(self) -> Moment:
        optimizer, state = self.optimizer, self.state  # type: ignore[attr-defined]
        rate = None if optimizer is None else float(optimizer.param_groups[0]["lr"])
        return Moment(str(self.method.current_task), state.global_step, state.max_steps, rate)

    def _count(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value
            self._term_counts[name] = self._term_counts.get(name, 0) + 1


class _ReplayCallback(TrainerCallback):
    """The moments that a Trainer offers only to callbacks."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        method = self._trainer.method
        method.stack.check_optimizer(_plain(self._trainer.optimizer))
        method.start_training(state.max_steps, self._epochs(args, state))
        self._trainer._begin_or_go_on()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_epoch()

    def _epochs(self, args: Any, state: Any) -> float:
        """Passes through the training set, whichever way its length was given."""
        dataset = self._trainer.train_dataset
        if args.max_steps <= 0 or not hasattr(dataset, "__len__"):
            return float(args.num_train_epochs)
        seen = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        return float(seen / max(1, len(dataset)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the scheduler moves on: after the last step a decayed learning rate is zero.
        trainer = self._trainer
        if trainer._separate and trainer.method.replay_due(state.global_step):
            trainer.replay_step(trainer.model_wrapped)


class ContinualTrainer(ContinualTrainerMixin, Trainer):
    """``transformers.Trainer`` with ``method=``.

    Takes tokenised datasets (``input_ids``, ``labels``) and pads them itself; pass ``data_collator`` to change that:
    the replay samples are then drawn as it makes them. ``model`` may be left out: it is the method's.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        model = kwargs["method"].model if model is None and kwargs.get("model_init") is None else model
        check_tokenised(train_dataset)
        self._collates_itself = data_collator is None
        if data_collator is None:
            check_labelled(train_dataset)
            names = frozenset() if model is None else ModelFacts.of(model).input_names
            sets = {"train_dataset": train_dataset}
            sets |= eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, dataset in sets.items():
                check_data_set(dataset, name, names)
            if args is not None:
                # The collator leaves out what it does not need, and refuses what it must not leave out.
                args = copy.copy(args)
                args.remove_unused_columns = False
            data_collator = answer_collator(model, names)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *others, **kwargs)

    def samples_to_draw_from(self) -> Any:
        dataset = super().samples_to_draw_from()
        if self._collates_itself or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            return dataset
        return Collated(dataset, self.data_collator, ModelFacts.of(self.model).input_names)


def forget_preparation(model: nn.Module) -> None:
    """Undo accelerate's preparation of ``model`` by an earlier trainer.

    Else accelerate (1.14) passes over a model that is prepared: a trainer with bf16 after one without would train
    without it, one after the other way round with it, and a process that goes on from a checkpoint otherwise than one
    that was never stopped.
    """
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False  # type: ignore[assignment]


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
