"""``ContinualTrainer``: a transformers Trainer whose steps also replay. May import everything below it.

Thin on purpose: the mixin decides only *when* the method's replay loss joins, so it sits on any Trainer subclass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .devices import check_one_gpu, check_one_process
from .divergence import Moment
from .errors import AdapterError, ConfigError, DataError, DivergenceError
from .forward import input_names, pad_token_id
from .inputs import CARRIED, check_batch, check_data_set, check_rows, check_sample
from .losses import IGNORED
from .methods import ContinualMethod
from .model_kind import embedding_rows
from .tasks import AnswerCollator

MOST_SKIPPED_STEPS = 30
"""Under fp16 accelerate's gradient scaler skips a step whose gradient overflowed and halves its scale. After so many
in a row a scale of 65536 is below 1e-4: it is not the scale that overflows."""


class ContinualTrainerMixin:
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

    Every loss term is logged apart: ``loss`` (the new task), ``replay_loss``, ``logits_loss``, ``attention_loss``.

    ``load_best_model_at_end`` brings back the task's own adapter as it was at the best checkpoint. A task whose
    ``replay_from`` was left out gets its replay samples from the training set.

    Raises:
        ConfigError: Several processes or GPUs, a ``model_init``, a ``peft_config``.
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
        self._input_names = input_names(method.model)
        self._skipped_steps = 0
        self._last_loss: Tensor | float = 0.0
        self._separate = method.config.replay_step == "separate"
        self._term_sums: dict[str, Tensor] = {}
        self._term_counts: dict[str, int] = {}
        self.add_callback(_ReplayCallback(self))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As in Trainer; resuming inside a task is refused, since it trains the wrong adapter without an error."""
        if resume_from_checkpoint:
            raise ConfigError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} would un-freeze the earlier tasks' adapter and "
                f"train it instead of the new one; resume a run after its last finished task: "
                f"seekr-peft run RECIPE --resume."
            )
        try:
            return super().train(**kwargs)  # type: ignore[misc]
        finally:
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
            if isinstance(labels, Tensor) and bool((labels == IGNORED).all()):
                raise DataError(
                    f"no token of the batch at step {step + 1} has a label (all are {IGNORED}), so its loss is no "
                    f"number; leave out samples without an answer, or raise max_length."
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
            self._count({"penalty_loss": penalty.detach()})

    def _load_best_model(self) -> None:
        # transformers 5.23: its own loads the checkpoint's template adapter into the first active one, which may be
        # the frozen sum of the earlier tasks.
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        self.method.stack.load_current(Path(best))

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
        _check_tokenised(train_dataset)
        self._collates_itself = data_collator is None
        if data_collator is None:
            _check_labelled(train_dataset)
            names = frozenset() if model is None else input_names(model)
            sets = {"train_dataset": train_dataset}
            sets |= eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, dataset in sets.items():
                check_data_set(dataset, name, names)
            if args is not None:
                # The collator leaves out what it does not need, and refuses what it must not leave out.
                args = copy.copy(args)
                args.remove_unused_columns = False
            data_collator = _own_collator(model, names)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *others, **kwargs)

    def samples_to_draw_from(self) -> Any:
        dataset = super().samples_to_draw_from()
        if self._collates_itself or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            return dataset
        return _Collated(dataset, self.data_collator, input_names(self.model))


class _Collated:
    """The rows of a data set as a collator makes each of them: with its labels, and without columns for no model."""

    def __init__(self, dataset: Any, collate: Any, names: frozenset[str]) -> None:
        self._dataset, self._collate, self._names = dataset, collate, {*names, "label", "label_ids"}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._dataset[index]
        check_sample(item, f"sample {index} of replay_from", self._names)
        batch = self._collate([{name: value for name, value in item.items() if name in self._names}])
        return {name: batch[name][0] for name in (*CARRIED, "position_ids") if name in batch}


def _own_collator(model: Any, names: frozenset[str]) -> Any:
    # Without a model the trainer is refused for another reason.
    if model is None:
        return list
    return AnswerCollator(pad_token_id(model), n_tokens=embedding_rows(model), input_names=names)


def _check_tokenised(dataset: Any) -> None:
    check_rows(dataset, "train_dataset")
    # A stream has no first item to look at.
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise ConfigError(
            f"train_dataset holds {type(first).__name__} items; it needs mappings with input_ids and labels."
        )
    if "input_ids" not in first:
        raise ConfigError(
            f"train_dataset has no 'input_ids' (it has {', '.join(sorted(first))}); tokenise the task first: "
            f"task.tokenized(tokenizer)."
        )


def _check_labelled(dataset: Any) -> None:
    # A stream has no first item to look at.
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return
    if "labels" not in dataset[0]:
        raise ConfigError(
            f"train_dataset has no 'labels' (it has {', '.join(sorted(dataset[0]))}); tokenise the task first: "
            f"task.tokenized(tokenizer), or pass the data_collator that makes them."
        )


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
