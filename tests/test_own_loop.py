"""Hand-written loops: a replay loss joins each optimiser step once and whole, whatever the loop accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainers import NEW, OLD, adapted, assert_close, copied, perturb
from torch import Tensor

from seekr_peft import Replay, Seekr, SeekrConfig
from seekr_peft.errors import ConfigError
from seekr_peft.methods import Lwf
from seekr_peft.tasks import AnswerCollator

MICRO, STEPS = 4, 3


@pytest.fixture(autouse=True)
def one_accelerator_a_test() -> Any:
    """accelerate keeps the settings of the first Accelerator of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def after_one_task(folder: Path, kind: type = Seekr, mode: str = "stack", **config: Any) -> Any:
    settings = SeekrConfig(**{"replay_ratio": 0.25, "replay_every": 1, "replay_batch_size": 2, **config})
    method = kind(adapted(), settings, directory=folder, adapter_mode=mode)
    with method.task("old", replay_from=OLD):
        perturb(method)
    torch.manual_seed(4)
    return method


def batches() -> list[dict[str, Tensor]]:
    collate = AnswerCollator(0)
    return [collate([sample]) for sample in NEW[: MICRO * STEPS]]


def optimizer_of(method: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.05)


def by_hand(folder: Path, kind: type = Seekr, mode: str = "stack", **config: Any) -> tuple[dict[str, Tensor], int]:
    """The reference: the mean of the micro-batches' gradients plus one whole replay gradient a step."""
    method = after_one_task(folder, kind, mode, **config)
    n_replays = 0
    with method.task("new", replay_from=NEW, optimizer_steps=STEPS):
        perturb(method)
        method.model.train()
        parameters = list(method.stack.parameters().values())
        for step in range(STEPS):
            total = [torch.zeros_like(p) for p in parameters]
            if method.replay_due(step):
                n_replays += 1
                with method.replay_terms(method.model) as terms:
                    total = [g.clone() for g in torch.autograd.grad(terms.total, parameters)]
            for batch in batches()[step * MICRO : (step + 1) * MICRO]:
                for place, g in enumerate(torch.autograd.grad(method.model(**batch).loss, parameters)):
                    total[place] = total[place] + g / MICRO
            for parameter, gradient in zip(parameters, total, strict=True):
                parameter.data -= 0.05 * gradient
        return copied(method.stack.parameters()), n_replays


def with_accelerate(method: Any, scaled: bool, only_when_syncing: bool = False) -> tuple[dict[str, Tensor], int]:
    """Parameters after the loop of accelerate's own documentation, and how often a replay loss was given."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    given = 0
    with method.task("new", replay_from=NEW, optimizer_steps=STEPS):
        perturb(method)
        method.model.train()
        model, optimizer = accelerator.prepare(method.model, optimizer_of(method))
        for batch in batches():
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                replay = method.replay_loss() if accelerator.sync_gradients or not only_when_syncing else None
                if replay is not None:
                    given += 1
                    loss = loss + replay * (accelerator.gradient_accumulation_steps if scaled else 1)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return copied(method.stack.parameters()), given


@pytest.mark.parametrize("only_when_syncing", [False, True])
@pytest.mark.parametrize(("kind", "mode"), [(Seekr, "stack"), (Replay, "continue"), (Lwf, "stack"), (Lwf, "continue")])
def test_accelerates_loop_replays_once_a_step_and_whole(
    tmp_path: Path, kind: type, mode: str, only_when_syncing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected, n_replays = by_hand(tmp_path / "hand", kind, mode)
    assert n_replays == STEPS
    caplog.clear()
    found, given = with_accelerate(after_one_task(tmp_path / "own", kind, mode), True, only_when_syncing)
    assert given == STEPS
    assert_close(found, expected)
    assert not [record for record in caplog.records if "on its way back" in record.getMessage()]


def test_every_second_step_stays_every_second_optimiser_step(tmp_path: Path) -> None:
    expected, n_replays = by_hand(tmp_path / "hand", replay_every=2)
    found, given = with_accelerate(after_one_task(tmp_path / "own", replay_every=2), scaled=True)
    assert given == n_replays == 1
    assert_close(found, expected)


@pytest.mark.parametrize("only_when_syncing", [False, True])
def test_a_replay_loss_that_accelerate_divides_is_noticed(
    tmp_path: Path, only_when_syncing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = by_hand(tmp_path / "hand")
    caplog.clear()
    found, _ = with_accelerate(after_one_task(tmp_path / "own"), False, only_when_syncing)
    told = [record.getMessage() for record in caplog.records if "on its way back" in record.getMessage()]
    assert len(told) == 1 and "multiplied by 0.25 " in told[0] and "accelerator.gradient_accumulation_steps" in told[0]
    assert max(float((found[key] - expected[key]).abs().max()) for key in found) > 1e-4


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_loop_without_accelerate_that_accumulates_is_answered_once_a_step(tmp_path: Path, set_to_none: bool) -> None:
    expected, _ = by_hand(tmp_path / "hand")
    method = after_one_task(tmp_path / "own")
    answered = []
    with method.task("new", replay_from=NEW, optimizer_steps=STEPS):
        perturb(method)
        method.model.train()
        optimizer = optimizer_of(method)
        for place, batch in enumerate(batches()):
            replay = method.replay_loss()
            answered.append(replay is not None)
            loss = method.model(**batch).loss / MICRO
            (loss if replay is None else loss + replay).backward()
            if (place + 1) % MICRO == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
        found = copied(method.stack.parameters())
    assert answered == [place % MICRO == 0 for place in range(len(answered))]
    assert_close(found, expected)


def test_a_loop_that_updates_by_hand_replays_in_each_step(tmp_path: Path) -> None:
    method = after_one_task(tmp_path / "own")
    answered = []
    with method.task("new", replay_from=NEW, optimizer_steps=6):
        parameters = list(method.stack.parameters().values())
        for batch in batches()[:6]:
            replay = method.replay_loss()
            answered.append(replay is not None)
            loss = method.model(**batch).loss
            (loss if replay is None else loss + replay).backward()
            for parameter in parameters:
                parameter.data -= 0.05 * parameter.grad
                parameter.grad.zero_()
    assert answered == [True] * 6


@pytest.mark.parametrize("how", ["one backward", "gradients by hand"])
def test_accumulating_in_another_way_is_known_from_the_first_optimizer_step_on(tmp_path: Path, how: str) -> None:
    method = after_one_task(tmp_path / "own")
    answered = []
    with method.task("new", replay_from=NEW, optimizer_steps=STEPS):
        parameters = list(method.stack.parameters().values())
        optimizer = optimizer_of(method)
        for step in range(STEPS):
            losses = []
            for batch in batches()[step * MICRO : (step + 1) * MICRO]:
                answered.append(method.replay_loss() is not None)
                losses.append(method.model(**batch).loss)
            if how == "one backward":
                torch.stack(losses).mean().backward()
            else:
                for parameter, gradient in zip(
                    parameters, torch.autograd.grad(torch.stack(losses).mean(), parameters), strict=True
                ):
                    parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
    assert answered[MICRO:] == [True, False, False, False] * (STEPS - 1)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_task_of_no_steps_is_refused(tmp_path: Path, steps: int) -> None:
    method = after_one_task(tmp_path / "own")
    with pytest.raises(ConfigError, match=f"optimizer_steps must be at least 1, or None, got {steps}"):
        with method.task("new", replay_from=NEW, optimizer_steps=steps):
            pass


def test_a_loop_without_an_optimizer_says_the_step_itself(tmp_path: Path) -> None:
    method = after_one_task(tmp_path / "own", replay_every=2)
    with method.task("new", replay_from=NEW, optimizer_steps=4):
        answered = [method.replay_loss(step=place // 2) is not None for place in range(8)]
    assert answered == [False, False, True, False, False, False, True, False]


def test_a_step_of_another_optimizer_is_none_of_the_adapters(tmp_path: Path) -> None:
    method = after_one_task(tmp_path / "own")
    other = torch.nn.Parameter(torch.ones(1))
    elsewhere = torch.optim.SGD([other], lr=0.1)
    with method.task("new", replay_from=NEW, optimizer_steps=2):
        answered = []
        for batch in batches()[:2]:
            answered.append(method.replay_loss() is not None)
            method.model(**batch).loss.backward()
            other.grad = torch.ones(1)
            elsewhere.step()
    assert answered == [True, False]


def test_the_first_step_of_a_loop_that_named_no_samples_is_refused(tmp_path: Path) -> None:
    method = Seekr(adapted(), directory=tmp_path / "method")
    with pytest.raises(ConfigError, match=r"task 'new': method 'seekr' keeps a replay memory, so pass replay_from="):
        with method.task("new"):
            optimizer = optimizer_of(method)
            method.model(**batches()[0]).loss.backward()
            optimizer.step()
            pytest.fail("trained on")
    assert method.task_names == []


def test_the_hook_on_optimizers_ends_with_the_task(tmp_path: Path) -> None:
    from torch.optim import optimizer as module

    before = len(module._global_optimizer_post_hooks)
    method = after_one_task(tmp_path / "own")
    with method.task("new", replay_from=NEW):
        assert len(module._global_optimizer_post_hooks) == before + 1
    with pytest.raises(ZeroDivisionError), method.task("third", replay_from=NEW):
        raise ZeroDivisionError
    assert len(module._global_optimizer_post_hooks) == before
