"""``ContinualTrainer``: a transformers Trainer whose steps also replay.

Thin on purpose: the mixin decides only *when* the method's replay loss joins, so it sits on any Trainer subclass.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from ..errors import AdapterError, ConfigError, DataError, DivergenceError, RunError
from ..files.atomic import remove_folder, replacing_folder
from ..files.manifest import write_manifest
from ..methods import ContinualMethod
from ..methods.divergence import Moment
from ..model.devices import check_one_gpu, check_one_process
from ..model.facts import ModelFacts
from ..tasks import AnswerCollator
from ..tasks.inputs import CARRIED, check_batch, check_data_set, check_rows, check_sample
from ..tasks.tokenize import IGNORED_LABEL
from .checkpoint import (
    ADAPTER,
    TRAINER_STATE,
    check_made_from,
    check_whole,
    latest_checkpoint,
    load_training,
    random_state,
    save_training,
    set_random_state,
)

logger = logging.getLogger("seekr_peft")

_HARMLESS = re.compile(
    "output_dir|overwrite_output_dir|logging_.*|log_.*|report_to|run_name|project|trackio_.*|disable_tqdm|save_.*|"
    "eval_.*|per_device_eval_batch_size|do_.*|load_best_model_at_end|metric_for_best_model|greater_is_better|"
    "push_to_hub.*|hub_.*|dataloader_num_workers|dataloader_prefetch_factor|dataloader_pin_memory|"
    "resume_from_checkpoint|restore_callback_states_from_checkpoint|include_.*|skip_memory_metrics|"
    "torch_empty_cache_steps|prediction_loss_only|batch_eval_metrics|use_cpu|enable_jit_checkpoint|.*_token|"
    "dataset_num_proc|chat_template_path|model_init_kwargs"
)
"""Settings of TrainingArguments that may be others when a training goes on: they change no number of it."""
_LOOKED_AT = 64
"""Samples of a training set that tell it from another one."""

_NOT_LOGGED = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_term_sums", "_term_counts")
"""Of the Trainer (transformers 5.23) and of the mixin: sums of losses since the last log."""

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
        self._separate = method.config.replay_step == "separate"
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

    def _checkpoint(self, asked: Any) -> Path:
        """The checkpoint to go on from, which is whole and of this training."""
        made_from = self._made_from()
        if asked is not True:
            check_whole(Path(asked))
            check_made_from(Path(asked), made_from)
            return Path(asked)
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        found = latest_checkpoint(folder, made_from)
        if found is None:
            raise ConfigError(
                f"resume_from_checkpoint=True, but {folder} has no checkpoint of task {made_from['task']!r}; leave it "
                f"out to train the task from its beginning."
            )
        check_made_from(found, made_from)
        return found

    def _loaded(self, checkpoint: Path) -> dict[str, Any]:
        state = load_training(checkpoint)
        if self.args.ignore_data_skip:  # type: ignore[attr-defined]
            raise ConfigError(
                "ignore_data_skip=True would train on samples again that were trained on before the checkpoint; leave "
                "it out."
            )
        if not hasattr(self.train_dataset, "__len__") and state["n_passes"] > 1:  # type: ignore[attr-defined]
            raise ConfigError(
                f"the checkpoint {checkpoint} was made in pass {state['n_passes']} through a stream, to which nothing "
                f"leads back; train the task from its beginning, or from a data set with a length."
            )
        return state

    def _made_from(self) -> dict[str, Any]:
        """What a checkpoint of this training belongs to."""
        given = self.args.to_dict()  # type: ignore[attr-defined]
        settings = {name: value for name, value in given.items() if not _HARMLESS.fullmatch(name)}
        dataset = self.train_dataset  # type: ignore[attr-defined]
        settings["samples"] = len(dataset) if hasattr(dataset, "__len__") else None
        if self._samples_digest is None:
            self._samples_digest = _digest_of(dataset)
        settings["digest of samples"] = self._samples_digest
        # As it comes back from JSON.
        return {**self.method.task_made_from(), "settings": json.loads(json.dumps(settings, default=str))}

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
            self._count({"penalty_loss": penalty.detach()})

    # transformers 5.23 writes and reads checkpoints by the methods from here on. Its own save all adapters but load the
    # untrained template into the first active one, which may be the frozen sum of the earlier tasks; they keep the
    # optimizer in a format that runs code when it is read, and write in place.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state, args = self.state, self.args  # type: ignore[attr-defined]
        self.store_flos()  # type: ignore[attr-defined]
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{state.global_step}"  # type: ignore[attr-defined]
        best = folder.with_name(f"checkpoint-{state.best_global_step}")
        if state.best_global_step and (best == folder or _is_of(best, self._made_from())):
            state.best_model_checkpoint = str(best)
        with replacing_folder(folder) as partial:
            self.method.stack.save_current(partial / ADAPTER)
            if not args.save_only_model:
                save_training(partial, self._training_state())
            self._keep_callback_states()
            state.save_to_json(str(partial / TRAINER_STATE))
            write_manifest(partial, str(self.method.current_task), self._made_from())
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))  # type: ignore[attr-defined]
        self._rotate(folder.parent)

    def _rotate(self, folder: Path) -> None:
        """Remove the oldest checkpoints beyond ``save_total_limit``, but not the best one."""
        limit = self.args.save_total_limit  # type: ignore[attr-defined]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        # The best one comes last but one.
        found = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True, best_model_checkpoint=best)]
        kept = max(limit or len(found), 1 + (best is not None and Path(best) != found[-1]))
        for path in found[:-kept]:
            remove_folder(path)

    def _training_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        return {
            "optimizer": self.optimizer.state_dict(),  # type: ignore[attr-defined]
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[attr-defined]
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random_state(),
            "epoch_began": self._epoch_began,
            "n_passes": self._n_passes,
            "place": self.method.place(),
            "not_logged": {name: getattr(self, name) for name in _NOT_LOGGED},
        }

    def _keep_callback_states(self) -> None:
        states = self.state.stateful_callbacks  # type: ignore[attr-defined]
        for name in states:
            found = [each for each in self._stateful() if type(each).__name__ == name]
            kept = [each.state() for each in found]
            if kept:
                states[name] = kept if isinstance(states[name], list) else kept[0]

    def _load_callback_state(self) -> None:
        # transformers' own only where it is asked for: early stopping would count its patience anew.
        kept = {name: list(_as_list(states)) for name, states in self.state.stateful_callbacks.items()}  # type: ignore[attr-defined]
        for callback in self._stateful():
            states = kept.get(type(callback).__name__, [])
            if states and callback is not self.control:  # type: ignore[attr-defined]
                for name, value in states.pop(0)["attributes"].items():
                    setattr(callback, name, value)

    def _stateful(self) -> list[Any]:
        everyone = [*self.callback_handler.callbacks, self.control]  # type: ignore[attr-defined]
        return [each for each in everyone if isinstance(each, ExportableState)]

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        self.method.stack.load_current(Path(resume_from_checkpoint) / ADAPTER)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)  # type: ignore[attr-defined]
        check_whole(best)
        check_made_from(best, self._made_from())
        self.method.stack.load_current(best / ADAPTER)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if self._goes_on_from is not None:
            self.optimizer.load_state_dict(self._goes_on_from["optimizer"])  # type: ignore[attr-defined]
            self.lr_scheduler.load_state_dict(self._goes_on_from["scheduler"])  # type: ignore[attr-defined]

    def _load_scaler(self, checkpoint: Any) -> None:
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        if self._goes_on_from is not None and scaler is not None and self._goes_on_from["scaler"] is not None:
            scaler.load_state_dict(self._goes_on_from["scaler"])

    def _load_rng_state(self, checkpoint: Any) -> None:
        if self._goes_on_from is not None:
            set_random_state(self._goes_on_from["random"])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5.23 looks whether a training is at its end after each step alone, so one that goes on from its
        # last step would be trained for one more.
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _begin_or_go_on(self) -> None:
        """Called when the training begins, after the method's plan for it was made."""
        if self._goes_on_from is not None:
            self.method.go_to(self._goes_on_from["place"])
            for name, value in self._goes_on_from["not_logged"].items():
                setattr(self, name, _on(value, self.args.device))  # type: ignore[attr-defined]
            # Also where no step is left to be done.
            set_random_state(self._goes_on_from["random"])

    def _begin_epoch(self) -> None:
        first, self._n_passes = self._n_passes == 0, self._n_passes + 1
        if first and self._goes_on_from is not None and not float(self.state.epoch).is_integer():  # type: ignore[attr-defined]
            set_random_state(self._goes_on_from["epoch_began"])
        self._epoch_began = random_state()

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
        _check_tokenised(train_dataset)
        self._collates_itself = data_collator is None
        if data_collator is None:
            _check_labelled(train_dataset)
            names = frozenset() if model is None else ModelFacts.of(model).input_names
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
        return _Collated(dataset, self.data_collator, ModelFacts.of(self.model).input_names)


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
    facts = ModelFacts.of(model)
    return AnswerCollator(facts.pad_token_id, n_tokens=facts.embedding_rows, input_names=names)


def forget_preparation(model: nn.Module) -> None:
    """Undo accelerate's preparation of ``model`` by an earlier trainer.

    Else accelerate (1.14) passes over a model that is prepared: a trainer with bf16 after one without would train
    without it, one after the other way round with it, and a process that goes on from a checkpoint otherwise than one
    that was never stopped.
    """
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False  # type: ignore[assignment]


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


def _digest_of(dataset: Any) -> str:
    """What tells a training set from another one of the same length; "" for a stream, and for one whose samples are
    others each time."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        return ""
    places = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
    texts = [str(_plain_sample(dataset[place])) for place in places]
    if texts[0] != str(_plain_sample(dataset[0])):
        return ""
    return hashlib.sha256("\n".join(texts).encode(errors="replace")).hexdigest()[:16]


def _plain_sample(sample: Any) -> Any:
    if not isinstance(sample, Mapping):
        return type(sample).__name__
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in sorted(sample.items())}


def _is_of(checkpoint: Path, made_from: dict[str, Any]) -> bool:
    try:
        check_made_from(checkpoint, made_from)
    except (RunError, ConfigError):
        return False
    return True


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _on(value: Any, device: torch.device) -> Any:
    """Tensors, also those in a dict, moved to ``device``."""
    if isinstance(value, dict):
        return {name: _on(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
