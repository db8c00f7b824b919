"""Whether a training still makes sense: refusals of a loss, a gradient or an adapter that is no finite number, and of a
training that stands still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DivergenceError

LEAST_LOSS = 1e-3
"""Nats; a loss above it has a gradient that float32 can tell from 0."""

_ADVICE = (
    "this task is dropped and the earlier ones are as they were: train it again with a lower learning_rate, a longer "
    "warm-up, or max_grad_norm."
)


@dataclass(frozen=True)
class Moment:
    """An optimiser ``step`` of ``task``, from 0, of ``n_steps`` (0: unknown), at learning ``rate`` (None: unknown)."""

    task: str
    step: int
    n_steps: int = 0
    rate: float | None = None

    def check_finite(self, what: str, value: Tensor | float) -> None:
        """Refuse to go on after a scalar that is infinite or no number. Waits for its device.

        Raises:
            DivergenceError: With task, step and learning rate.
        """
        number = _number(value)
        if not math.isfinite(number):
            raise self._error(f"the {what} is {number}")

    def check_moving(self, gradient_norm: Tensor | float, loss: Tensor | float) -> None:
        """Refuse to go on with a loss that has no gradient: numbers so large that normalisation turns them into nothing
        leave a model that answers everything alike, with a finite loss.

        Raises:
            DivergenceError: With task, step and learning rate.
        """
        if _number(gradient_norm) == 0 and _number(loss) > LEAST_LOSS:
            raise self._error(
                f"its loss is {_number(loss):.3g} nats and the gradient of every adapter weight is 0 (numbers that "
                f"overflow, or something that cuts the adapter off, such as reentrant checkpointing)"
            )

    def _error(self, what: str) -> DivergenceError:
        of_all = f" of {self.n_steps}" if self.n_steps > 0 else ""
        at_rate = "" if self.rate is None else f" with learning rate {self.rate:.3g}"
        return DivergenceError(
            f"task {self.task!r} diverged: {what} at optimiser step {self.step + 1}{of_all}{at_rate}; {_ADVICE}"
        )


def check_adapter(parameters: Mapping[str, Tensor], task: str) -> None:
    """Refuse to keep an adapter that holds a value which is infinite or no number.

    Raises:
        DivergenceError: With the task and the first such tensor.
    """
    for path, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergenceError(
                f"task {task!r} diverged: at its end its adapter holds values that are infinite or no numbers, first "
                f"in {path}; {_ADVICE}"
            )


def _number(value: Tensor | float) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
