"""What a Trainer writes and reads inside a task: its checkpoints, and how a training goes on from one.

transformers' own checkpoints (5.23) save all adapters but load the untrained template into the first active one, which
may be the frozen sum of the earlier tasks; they keep the optimizer in a format that runs code when it is read, and they
write in place.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from ..errors import ConfigError
from ..files.atomic import remove_folder, replacing_folder
from ..files.manifest import write_manifest
from ..methods import ContinualMethod
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
from .training_data import (
    as_list,
    digest_of,
    is_checkpoint_of,
    moved_to,
)

_HARMLESS = re.compile(
    "output_dir|overwrite_output_dir|logging_.*|log_.*|report_to|run_name|project|trackio_.*|disable_tqdm|save_.*|"
    "eval_.*|per_device_eval_batch_size|do_.*|load_best_model_at_end|metric_for_best_model|greater_is_better|"
    "push_to_hub.*|hub_.*|dataloader_num_workers|dataloader_prefetch_factor|dataloader_pin_memory|"
    "resume_from_checkpoint|restore_callback_states_from_checkpoint|include_.*|skip_memory_metrics|"
    "torch_empty_cache_steps|prediction_loss_only|batch_eval_metrics|use_cpu|enable_jit_checkpoint|.*_token|"
    "dataset_num_proc|chat_template_path|model_init_kwargs"
)
"""Settings of TrainingArguments that may be others when a training goes on: they change no number of it."""

_NOT_LOGGED = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_term_sums", "_term_counts")
"""Of the Trainer (transformers 5.23) and of the mixin: sums of losses since the last log."""


class CheckpointMixin:
    """The methods by which transformers (5.23) writes and reads checkpoints, for a trainer with a ``method``."""

    method: ContinualMethod
    _epoch_began: dict[str, Any]
    """The random numbers' state when the epoch began: the order of its samples is drawn from there."""
    _n_passes: int
    """Through the training set, by this call of ``train``."""
    _samples_digest: str | None
    _goes_on_from: dict[str, Any] | None

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
            self._samples_digest = digest_of(dataset)
        settings["digest of samples"] = self._samples_digest
        # As it comes back from JSON.
        return {**self.method.task_made_from(), "settings": json.loads(json.dumps(settings, default=str))}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state, args = self.state, self.args  # type: ignore[attr-defined]
        self.store_flos()  # type: ignore[attr-defined]
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{state.global_step}"  # type: ignore[attr-defined]
        best = folder.with_name(f"checkpoint-{state.best_global_step}")
        if state.best_global_step and (best == folder or is_checkpoint_of(best, self._made_from())):
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
        kept = {name: list(as_list(states)) for name, states in self.state.stateful_callbacks.items()}  # type: ignore[attr-defined]
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
                setattr(self, name, moved_to(value, self.args.device))  # type: ignore[attr-defined]
            # Also where no step is left to be done.
            set_random_state(self._goes_on_from["random"])

    def _begin_epoch(self) -> None:
        first, self._n_passes = self._n_passes == 0, self._n_passes + 1
        if first and self._goes_on_from is not None and not float(self.state.epoch).is_integer():  # type: ignore[attr-defined]
            set_random_state(self._goes_on_from["epoch_began"])
        self._epoch_began = random_state()
