"""What a hand-written training loop does to a method's replay loss: which optimiser step a call belongs to, and how the
loss is weighted on its way back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

logger = logging.getLogger("seekr_peft")


class StepCounter:
    """Tells which optimiser step of ``parameters`` a call belongs to, whoever makes the steps.

    A torch optimizer's are seen by torch's own hook after ``Optimizer.step``, from its first one on: calls without one
    in between belong to one step (accelerate skips the optimizer's step inside an accumulation). Before the first, and
    in a loop that updates the parameters by hand, calls belong to one step while gradients are added and no value
    changes.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._n_optimizer_steps = 0
        self._step = -1
        self._place: tuple[int, float] | None = None
        self._weight_is_known = False

    @contextmanager
    def counting(self, before_first: Callable[[], None]) -> Iterator[None]:
        """See the steps of all optimizers inside; ``before_first`` may refuse them."""
        own = {id(parameter) for parameter in self._parameters}

        def count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                before_first()
                self._n_optimizer_steps += 1

        handle = register_optimizer_step_post_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def begun(self, step: int | None) -> int | None:
        """The number of the optimiser step that a call belongs to, from 0; None when a call already belonged to it."""
        here = self._here()
        if step == self._step or (step is None and here == self._place and self._may_accumulate()):
            return None
        self._place, self._step = here, self._step + 1 if step is None else step
        return self._step

    def _may_accumulate(self) -> bool:
        return self._n_optimizer_steps > 0 or any(parameter.grad is not None for parameter in self._parameters)

    def _here(self) -> tuple[int, float]:
        """The steps of optimizers; and, as long as there were none, what changes with any value of the parameters."""
        if self._n_optimizer_steps or not self._parameters:
            return self._n_optimizer_steps, 0.0
        sums = [parameter.detach().double().square().sum() for parameter in self._parameters]
        return 0, float(torch.stack(sums).sum())

    def weighed(self, weight: Tensor) -> None:
        """Say once when the replay loss was scaled down in the backward: most likely by accident."""
        if self._weight_is_known:
            return
        self._weight_is_known = True
        if 0 < float(weight) < 1:
            logger.warning(
                "the replay loss was multiplied by %.3g on its way back. It is added once per optimiser step, so it "
                "must not be divided by the accumulation steps, as accelerator.backward() does: multiply it by "
                "accelerator.gradient_accumulation_steps (or ignore this, where the weight is meant).",
                float(weight),
            )


class GivenGradient(torch.autograd.Function):
    """A scalar whose backward hands out gradients that were computed before, times the gradient that it is given; that
    one is shown to ``weighed``."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weighed: Callable[[Tensor], None], gradients: list[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.weighed, ctx.gradients = weighed, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weighed(outer[0])
        return (None, None, None, *[gradient * outer[0] for gradient in ctx.gradients])


def with_given_gradient(loss: Tensor, parameters: Iterable[Tensor], weighed: Callable[[Tensor], None]) -> Tensor:
    """The scalar ``loss`` without its graph: its gradient is computed now, and its backward hands that out."""
    wanted = list(parameters)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    kept = [(p, g) for p, g in zip(wanted, gradients, strict=True) if g is not None]
    found: Tensor = GivenGradient.apply(loss.detach(), weighed, [g for _, g in kept], *[p for p, _ in kept])
    return found
