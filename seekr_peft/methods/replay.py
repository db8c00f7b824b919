"""Plain replay: train on the labels of the kept samples again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn

from ..config import MethodConfig, ReplayConfig
from ..losses import ReplayTerms, combine, label_loss
from ..memory import ReplayBatch, ReplayMemory, ReplaySample, TaskMemory, choose_samples, estimate_bytes
from ..memory.samples import SELECTORS, SampleSelector, check_token_ids
from ..model.answers import answer_logits
from .base import ContinualMethod
from .rhythm import Rhythm, plan_rhythm


class Replay(ContinualMethod):
    """Keep a share of each task's samples and train on their labels while later tasks are learnt.

    ``select_samples(dataset, count, seed) -> indices`` replaces the configured choice of samples.
    """

    name: ClassVar[str] = "replay"
    uses_replay: ClassVar[bool] = True
    config_class: ClassVar[type[MethodConfig]] = ReplayConfig

    config: ReplayConfig

    def __init__(
        self,
        model: PeftModel,
        config: MethodConfig | None = None,
        *,
        select_samples: SampleSelector | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, config, **options)
        self.memory = ReplayMemory()
        self.rhythm = Rhythm.never()
        self._select = select_samples or SELECTORS[self.config.sample_selection]
        self._samples: list[ReplaySample] = []
        self._stream: Iterator[ReplayBatch] = iter(())

    def before_training(self, replay_from: Any) -> None:
        """Draw the task's replay samples and start the stream over the earlier tasks' ones."""
        seed = self.config.seed + len(self.task_names)
        self._samples = choose_samples(
            replay_from,
            self.config.replay_ratio,
            self.config.query_budget,
            seed,
            self._select,
            self.config.query_choice,
            self.facts.input_names,
        )
        check_token_ids(self._samples, self.facts.embedding_rows)
        self._stream = self._batches()

    def go_to(self, place: dict[str, Any]) -> None:
        super().go_to(place)
        self._stream = self._batches()

    def _batches(self) -> Iterator[ReplayBatch]:
        """The earlier tasks' samples in this task's order, from the place that it has come to."""
        seed = self.config.seed + len(self.task_names)
        # Asked for each batch: a Trainer moves the model after the task began.
        facts, size = self.facts, self.config.replay_batch_size
        return self.memory.stream(size, seed, facts.pad_token_id, lambda: facts.device, self._n_replayed)

    def start_training(self, total_steps: int | None = None, epochs: float = 1.0) -> None:
        """Plan when replay batches fall due."""
        config = self.config
        self.rhythm = plan_rhythm(
            len(self.memory),
            config.replay_batch_size,
            total_steps,
            epochs,
            config.min_replay_passes,
            config.replay_every,
        )

    def replay_due(self, step: int) -> bool:
        return self.rhythm.due(step)

    @contextmanager
    def replay_terms(self, model: nn.Module) -> Iterator[ReplayTerms]:
        batch = self._next_batch()
        logits, targets = answer_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
        yield self._label_terms(logits, targets)

    def after_training(self, directory: Path) -> None:
        """Write the samples."""
        header = {"estimated_bytes": self.estimated_bytes()}
        TaskMemory.write(directory, str(self.current_task), self._samples, header=header)

    def after_saving(self, directory: Path) -> None:
        self.memory.add(TaskMemory(directory))

    def after_restore(self, directories: list[Path]) -> None:
        self.memory = ReplayMemory([TaskMemory(directory) for directory in directories])
        for task in self.memory.tasks if not self.was_listed else []:
            task.check_values(self.facts.embedding_rows)

    def estimated_bytes(self) -> int:
        """Bytes that the current task's memory will take, before anything is computed."""
        return estimate_bytes(self._samples, n_heads=0, row_top_k=1, logit_top_k=0, vocabulary=1)

    def _next_batch(self) -> ReplayBatch:
        self._n_replayed += 1
        return next(self._stream).to(self.facts.device)

    def _label_terms(self, logits: Tensor, targets: Tensor) -> ReplayTerms:
        return combine(label_loss(logits, targets), None, None, 1.0, 0.0)
