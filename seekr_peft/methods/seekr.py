"""SEEKR: replay with the teacher's logits and with the attention of the heads that matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attention import AttentionTap
from ..attention.capture import AttentionCall
from ..attention.models import check_capture, uses_reentrant_checkpointing
from ..config import MethodConfig, SeekrConfig
from ..errors import CaptureError, MemoryFormatError
from ..files.atomic import save_tensors
from ..files.manifest import StoredFiles
from ..heads import HeadSelection, ImportanceRecord
from ..losses import ReplayTerms, combine, label_loss, logits_kl
from ..memory import PackedSignals, ReplayBatch, TaskMemory, TeacherQuality, estimate_bytes
from ..model.answers import answer_logits
from .base import logger
from .head_scores import score_heads, teach
from .replay import Replay

IMPORTANCE_FILE = "importance.safetensors"

ROUGH_UP_TO = 100.0
"""The lambda2 from which eight-bit rows are worth a warning. Their rounding leaves a gradient where the student is the
teacher itself, of about 6e-4 of lambda2, which from there on is as large as a loss's own near its end."""


class Seekr(Replay):
    """Selective attention-guided knowledge retention (SEEKR, arXiv 2411.06171) over LoRA adapters.

    After each task every head is scored on the task's replay samples, the important ones are selected, and the
    model's attention rows (of those heads) and answer distributions are stored. While later tasks are trained, each
    replay step adds  lambda1 * L_replay + (1 - lambda1) * L_logits + lambda2 * L_attention.
    """

    name: ClassVar[str] = "seekr"
    teacher_signals: ClassVar[tuple[str, ...]] = ("attention", "logits")
    config_class: ClassVar[type[MethodConfig]] = SeekrConfig

    config: SeekrConfig

    def __init__(self, model: PeftModel, config: MethodConfig | None = None, **options: Any) -> None:
        given: Any = self.config_class.of(config)
        config = replace(
            given,
            attention_distillation=given.attention_distillation and "attention" in self.teacher_signals,
            logits_distillation=given.logits_distillation and "logits" in self.teacher_signals,
        )
        super().__init__(model, config, **options)
        self._warn_of_rough_rows()
        self.importance = ImportanceRecord()
        self.selections: list[HeadSelection] = []
        self._pending: tuple[ImportanceRecord, HeadSelection] | None = None
        self._shape = self.facts.head_shape
        self._layers = self.facts.attention_layers

    def _warn_of_rough_rows(self) -> None:
        config = self.config
        if config.attention_distillation and config.lambda2 >= ROUGH_UP_TO and config.storage_dtype == "uint8":
            logger.warning(
                "lambda2 is %g, and attention rows are stored in uint8: by their rounding a student that equals its "
                "teacher still gets a gradient of about 0.0006 * lambda2; set storage_dtype to float16, which takes "
                "half as much disk space again.",
                config.lambda2,
            )

    def check_model(self, model: PeftModel) -> None:
        super().check_model(model)
        # Now, not when the heads are scored after the first task.
        if self.config.attention_distillation:
            check_capture(model)

    def start_training(self, total_steps: int | None = None, epochs: float = 1.0) -> None:
        # Before the first task is trained, not when its heads are scored.
        if self.config.attention_distillation and uses_reentrant_checkpointing(self.model, in_any_mode=True):
            raise CaptureError(
                "the model uses reentrant activation checkpointing, under which a captured attention has no gradient; "
                "call prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={'use_reentrant': False}) or "
                "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        super().start_training(total_steps, epochs)

    def after_training(self, directory: Path) -> None:
        """Score the heads, select, and store samples, rows and logits."""
        estimate = self.estimated_bytes()
        logger.info(
            "task %s: remembering %d samples, at most %.2f MB on disk",
            self.current_task,
            len(self._samples),
            estimate / 1e6,
        )
        selection = self._select_heads(directory) if self.config.attention_distillation else HeadSelection({})
        signals, quality = self._teach(selection)
        header = self._memory_header(estimate)
        TaskMemory.write(directory, str(self.current_task), self._samples, signals, selection, quality, header)

    def _select_heads(self, directory: Path) -> HeadSelection:
        """The heads to distil; this task's scores are written into ``directory``."""
        record, selection = self._pending = self._score_and_select()
        # float64: a resumed run must select the very same heads.
        own = {"forgettability": record.forgettability[-1], "sensitivity": record.sensitivity[-1]}
        save_tensors({name: scores.clone() for name, scores in own.items()}, directory / IMPORTANCE_FILE)
        return selection

    def _teach(self, selection: HeadSelection) -> tuple[list[PackedSignals], TeacherQuality]:
        """What is stored of the teacher with each sample, and how good a teacher it is; a poor one is told."""
        config = self.config
        signals, loss, entropy = teach(
            self.model,
            self._samples,
            selection,
            config.row_top_k,
            config.logit_top_k if config.logits_distillation else 0,
            config.kept_mass,
            keep=lambda signals: PackedSignals.of(signals, selection, config.storage_dtype),
        )
        worth = loss <= config.teacher_loss_limit and entropy <= config.teacher_entropy_limit
        if not worth:
            logger.warning(
                "task %s: its teacher is a poor one (%.2f nats a token on its own replay samples, answer entropy %.2f "
                "nats); imitating it keeps less than a good one would: train this task longer.",
                self.current_task,
                loss,
                entropy,
            )
        return signals, TeacherQuality(loss, entropy, worth)

    def _memory_header(self, estimate: int) -> dict[str, Any]:
        config = self.config
        return {
            "estimated_bytes": estimate,
            "queries_per_sample": max(len(sample.queries) for sample in self._samples),
            "row_top_k": config.row_top_k,
            "logit_top_k": config.logit_top_k,
            "kept_mass": config.kept_mass,
            "model": self._model_identity(),
        }

    def after_saving(self, directory: Path) -> None:
        super().after_saving(directory)
        if self._pending is not None:
            self.importance, selection = self._pending
            self.selections.append(selection)
            self._pending = None
            self._save_importance()

    def after_restore(self, directories: list[Path]) -> None:
        super().after_restore(directories)
        for task in self.memory.tasks:
            found = task.header.get("model")
            if found != self._model_identity():
                raise MemoryFormatError(
                    f"{task.directory} was written for a model with {found}, this one has {self._model_identity()}; "
                    f"load the base model that the run was trained on."
                )
        self.selections = [task.selection for task in self.memory.tasks]
        if self.config.attention_distillation and directories:
            StoredFiles(self.directory).check(self.directory / IMPORTANCE_FILE)
            for directory in directories:
                self._load_importance(directory)
            if not (self.directory / IMPORTANCE_FILE).exists():
                self._save_importance()

    def estimated_bytes(self) -> int:
        """Bytes that the current task's memory will take, before anything is computed."""
        config = self.config
        return estimate_bytes(
            self._samples,
            config.distilled_heads(len(self._layers), self._shape[1]),
            config.row_top_k,
            config.logit_top_k if config.logits_distillation else 0,
            self.facts.vocabulary,
            config.storage_dtype,
        )

    @contextmanager
    def replay_terms(self, model: nn.Module) -> Iterator[ReplayTerms]:
        batch = self._next_batch()
        with AttentionTap(self.model, batch.heads, batch.queries, observe=_row_loss(batch), keep_graph=True) as tap:
            logits, targets = answer_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
            attention: Tensor | None = None
            if tap.values:
                attention = torch.stack(list(tap.values.values())).sum()
            teacher = batch.logits
            yield combine(
                label_loss(logits, targets),
                logits_kl(logits, teacher) if teacher is not None else None,
                attention,
                self.config.lambda1,
                self.config.lambda2,
            )

    def _score_and_select(self) -> tuple[ImportanceRecord, HeadSelection]:
        """The record with this task's scores, and the heads; taken over only once the task is on disk: a failure before
        that leaves the earlier tasks' record as it was."""
        config = self.config
        scores = score_heads(self.stack, self._samples, config.norm, config.sensitivity_queries == "all")
        record = self.importance.extended(scores.forgettability, scores.sensitivity)
        # Below the first adapted layer attention cannot change, so it has no gradient either.
        moved = [layer for layer in self._layers if scores.forgettability[layer].any()]
        if not moved:
            logger.warning(
                "task %s: its training changed no attention at all, so none is distilled; put the adapter on the "
                "attention or on a layer below it.",
                self.current_task,
            )
            return record, HeadSelection({})
        selection = record.select(
            config.head_choice,
            config.layer_budget,
            config.head_budget,
            accumulate=config.accumulate,
            layer_choice=config.layer_choice,
            seed=config.seed + len(self.task_names),
            layers=moved,
        )
        return record, selection

    def _model_identity(self) -> dict[str, int | str]:
        n_layers, n_heads = self._shape
        return {
            "model_type": self.facts.model_type,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "vocabulary": self.facts.vocabulary,
        }

    def _save_importance(self) -> None:
        record, shape = self.importance, self._shape
        tensors = {
            "forgettability": record.total_forgettability().float(),
            "sensitivity": record.total_sensitivity().float(),
            "importance": record.importance(self.config.accumulate).float(),
        }
        names = [task.directory.name for task in self.memory.tasks]
        for name, change, gradient, selection in zip(
            names, record.forgettability, record.sensitivity, self.selections, strict=True
        ):
            tensors[f"forgettability.{name}"] = change.clone()
            tensors[f"sensitivity.{name}"] = gradient.clone()
            tensors[f"selected.{name}"] = selection.mask(*shape)
        with self.ledger.replacing(IMPORTANCE_FILE) as temporary:
            save_file(tensors, temporary)

    def _load_importance(self, directory: Path) -> None:
        path, suffix = directory / IMPORTANCE_FILE, ""
        if not path.is_file():
            # An earlier version kept the scores of all tasks in one file alone.
            path, suffix = self.directory / IMPORTANCE_FILE, f".{directory.name}"
        try:
            with safe_open(path, framework="pt") as file:
                self.importance.forgettability.append(file.get_tensor(f"forgettability{suffix}"))
                self.importance.sensitivity.append(file.get_tensor(f"sensitivity{suffix}"))
        except Exception as error:
            raise MemoryFormatError(
                f"{path} cannot be read ({error}); the run directory is incomplete, start it again without --resume."
            ) from error


def _row_loss(batch: ReplayBatch) -> Any:
    def observe(layer: int, call: AttentionCall) -> Tensor:
        teacher = batch.layers[layer]
        return call.pair_kl(teacher.pairs, teacher.rows, teacher.weights)

    return observe
