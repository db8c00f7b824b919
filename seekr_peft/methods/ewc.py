"""EWC: parameters that mattered for earlier tasks are held in place (arXiv 1612.00796)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import MethodConfig
from ..errors import MemoryFormatError
from ..files.atomic import save_tensors
from ..losses import label_loss
from ..memory import ReplaySample, choose_samples
from ..model.answers import answer_logits, evaluation_mode
from .base import ContinualMethod
from .settings import EwcConfig

FISHER_FILE = "fisher.safetensors"


class Ewc(ContinualMethod):
    """Adds ``ewc_lambda`` / 2 * sum over tasks t and parameters of F_t (theta - theta_t)^2 to every optimiser step.

    F_t is the diagonal of the empirical Fisher information of the adapter's parameters, the mean square of the loss
    gradient over ``ewc_samples`` training samples, one sample at a time, divided by its mean over all parameters: a
    task that was learnt to a loss near zero has a tiny information, and would not be held at all. One adapter goes on
    training through all tasks (``adapter_mode="continue"``): a fresh adapter has no earlier value to be held at.
    Keeps no samples.
    """

    name: ClassVar[str] = "ewc"
    needs_samples: ClassVar[bool] = True
    adapter_modes: ClassVar[tuple[str, ...]] = ("continue",)
    config_class: ClassVar[type[MethodConfig]] = EwcConfig

    config: EwcConfig

    def __init__(self, model: PeftModel, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self._tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._samples: list[ReplaySample] = []

    def before_training(self, replay_from: Any) -> None:
        size = len(replay_from) if hasattr(replay_from, "__len__") else 1
        ratio = min(1.0, self.config.ewc_samples / max(1, size))
        seed = self.config.seed + len(self.task_names)
        self._samples = choose_samples(replay_from, ratio, 1, seed, input_names=self.facts.input_names)

    def penalty(self) -> Tensor | None:
        if not self._tasks or self.config.ewc_lambda == 0:
            return None
        parameters = self.stack.parameters()
        terms = [
            (fisher[path] * (parameters[path] - value).square()).sum()
            for fisher, values in self._tasks
            for path, value in values.items()
        ]
        return self.config.ewc_lambda / 2 * torch.stack(terms).sum()

    def after_training(self, directory: Path) -> None:
        """Write the Fisher diagonal and the parameters it belongs to."""
        parameters = self.stack.parameters()
        fisher = {path: torch.zeros_like(parameter) for path, parameter in parameters.items()}
        with evaluation_mode(self.model), torch.enable_grad():
            for sample in self._samples:
                ids = sample.input_ids[None].to(self.facts.device)
                labels = sample.labels[None].to(ids.device)
                loss = label_loss(*answer_logits(self.model, ids, torch.ones_like(ids), labels))
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for path, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        fisher[path] += gradient.square() / len(self._samples)
        fisher = _scaled_to_mean_one(fisher)
        tensors = {f"fisher.{path}": value.cpu().contiguous() for path, value in fisher.items()}
        tensors |= {f"value.{path}": value.detach().cpu().contiguous() for path, value in parameters.items()}
        save_tensors(tensors, directory / FISHER_FILE)

    def after_saving(self, directory: Path) -> None:
        self._tasks.append(self._read(directory))

    def after_restore(self, directories: list[Path]) -> None:
        self._tasks = [self._read(directory) for directory in directories]

    def _read(self, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        path = directory / FISHER_FILE
        try:
            tensors = load_file(path, device=str(self.facts.device))
        except (OSError, SafetensorError) as error:
            raise MemoryFormatError(f"{path} cannot be read ({error}); run that task again.") from error
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            found[kind == "value"][parameter] = tensor
        return found


def _scaled_to_mean_one(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    mean = sum(float(value.sum()) for value in fisher.values()) / sum(value.numel() for value in fisher.values())
    return {path: value / mean for path, value in fisher.items()} if mean > 0 else fisher
