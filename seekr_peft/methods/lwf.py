"""LwF: the model before the task teaches on the new task's own samples (arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn

from ..config import MethodConfig
from ..heads import HeadSelection
from ..losses import ReplayTerms, Term, softened_kl
from ..memory import ReplayBatch, ReplaySample, TeacherSignals, choose_samples, collate
from ..memory.stream import endless_batches
from ..model.answers import answer_logits, evaluation_mode
from .base import ContinualMethod
from .rhythm import Rhythm
from .settings import LwfConfig


class Lwf(ContinualMethod):
    """Adds ``lwf_lambda`` * KL(teacher || student) at temperature ``lwf_temperature`` on samples of the new task.

    The teacher is the model as it was before the task (the earlier adapters without the new one), run beside the
    student. Keeps no samples. Every ``replay_every`` optimiser steps (default: every one) a batch of
    ``replay_batch_size`` samples of the new task is drawn for it, apart from the new task's own batch: a Trainer
    does not hand out that one's logits (TRL's never does). A step with it costs two forwards and a backward more.
    """

    name: ClassVar[str] = "lwf"
    needs_samples: ClassVar[bool] = True
    config_class: ClassVar[type[MethodConfig]] = LwfConfig

    config: LwfConfig

    def __init__(self, model: PeftModel, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.rhythm = Rhythm.never()
        self._samples: list[ReplaySample] = []
        self._stream: Iterator[ReplayBatch] = iter(())

    def before_training(self, replay_from: Any) -> None:
        """Every sample of the task may be drawn."""
        if self._has_teacher():
            self._samples = choose_samples(replay_from, 1.0, 1, self.config.seed, input_names=self.facts.input_names)
            self._stream = self._batches()

    def go_to(self, place: dict[str, Any]) -> None:
        super().go_to(place)
        self._stream = islice(self._batches(), self._n_replayed, None)

    def start_training(self, total_steps: int | None = None, epochs: float = 1.0) -> None:
        self.rhythm = Rhythm.every(self.config.replay_every or 1) if self._has_teacher() else Rhythm.never()

    def replay_due(self, step: int) -> bool:
        return self.rhythm.due(step)

    @contextmanager
    def replay_terms(self, model: nn.Module) -> Iterator[ReplayTerms]:
        self._n_replayed += 1
        batch = next(self._stream).to(self.facts.device)
        inputs = (batch.input_ids, batch.attention_mask, batch.labels)
        # Dropout off for the teacher alone: it is one fixed model.
        with evaluation_mode(model), self.stack.before_task(), torch.no_grad():
            teacher, _ = answer_logits(model, *inputs)
        student, _ = answer_logits(model, *inputs)
        divergence = softened_kl(student, teacher, self.config.lwf_temperature)
        yield ReplayTerms({"logits": Term(self.config.lwf_lambda, divergence)})

    def _has_teacher(self) -> bool:
        """Whether there is anything to keep: an earlier task, or an adapter that the model brought along."""
        return bool(self.task_names) or self.stack.adopted

    def _batches(self) -> Iterator[ReplayBatch]:
        """Batches of the new task's samples, without signals, without end."""
        seed = self.config.seed + len(self.task_names)
        size = self.config.replay_batch_size
        for places in endless_batches(len(self._samples), size, seed, leaves_rest_out=True):
            chosen = [self._samples[place] for place in places]
            nothing = [HeadSelection({})] * len(chosen), [TeacherSignals({}, None)] * len(chosen)
            yield collate(chosen, *nothing, self.facts.pad_token_id)
