"""A training that makes no sense any more stops at once, names task, step and learning rate, and keeps no such task."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import command
from support.small_run import read_json, small_recipe
from support.tiny_models import tiny_llama
from support.trainers import NEW, OLD, adapted, arguments, copied, perturb

from seekr_peft import ContinualTrainer, Replay, Seekr, SeekrConfig, Sequential
from seekr_peft.errors import DataError, DivergenceError
from seekr_peft.losses import ReplayTerms, Term
from seekr_peft.methods import Ewc, Lwf
from seekr_peft.training.trainer import MOST_SKIPPED_STEPS

METHODS = (Sequential, Replay, Seekr, Lwf)


def after_one_task(kind: type, folder: Path, mode: str = "stack", **config: Any) -> Any:
    settings = SeekrConfig(**{"replay_ratio": 0.25, "replay_every": 1, "replay_batch_size": 2, **config})
    method = kind(adapted(), settings, directory=folder / "method", adapter_mode=mode)
    with method.task("old", replay_from=OLD):
        perturb(method)
    return method


def train(method: Any, folder: Path, spoil: Any = None, **changes: Any) -> Any:
    """Train task "new"; ``spoil(trainer)`` may break something before."""
    with method.task("new", replay_from=NEW):
        args = arguments(folder / "out", max_steps=6, **changes)
        trainer = ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW)
        if spoil:
            spoil(trainer)
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", METHODS)
def test_a_learning_rate_of_a_billion_ends_within_a_few_steps(tmp_path: Path, kind: type) -> None:
    method = after_one_task(kind, tmp_path)
    earlier = copied(method.stack.earlier_parameters())
    with pytest.raises(DivergenceError) as refused:
        train(method, tmp_path, learning_rate=1e9, lr_scheduler_type="constant")
    pattern = r"task 'new' diverged: .+ at optimiser step [2-6] of 6 with learning rate 1e\+09; this task is dropped"
    assert re.match(pattern, str(refused.value)), refused.value
    assert method.task_names == ["old"] and method.current_task is None
    assert sorted(path.name for path in (method.directory / "tasks").iterdir()) == ["01-old"]
    now = copied(method.stack.earlier_parameters())
    assert all(torch.equal(now[key], earlier[key]) for key in earlier)
    train(method, tmp_path)
    assert method.task_names == ["old", "new"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_bad_loss_is_reported_with_its_own_step(tmp_path: Path, accumulation: int) -> None:
    def spoil(trainer: Any) -> None:
        own = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = own(*args, **kwargs)
            return loss * float("nan") if trainer.state.global_step == 2 else loss

        trainer.compute_loss = compute_loss

    method = after_one_task(Sequential, tmp_path)
    rates = {"lr_scheduler_type": "linear", "learning_rate": 0.06}
    with pytest.raises(DivergenceError, match=r"the loss is nan at optimiser step 3 of 6 with learning rate 0\.04;"):
        train(method, tmp_path, spoil, gradient_accumulation_steps=accumulation, **rates)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(("value", "told"), [(float("nan"), "nan"), (float("inf"), "inf"), (1e200, "inf")])
def test_a_gradient_norm_that_is_no_finite_number_stops_before_the_step(
    tmp_path: Path, value: float, told: str, max_grad_norm: float
) -> None:
    """1e200 is finite; the sum of the squares is not, and clipping by it would make every gradient 0."""
    stepped: list[int] = []

    def spoil(trainer: Any) -> None:
        parameter = next(iter(trainer.method.stack.parameters().values()))
        parameter.register_hook(lambda g: g + value if trainer.state.global_step == 1 else g)
        trainer.create_optimizer().register_step_post_hook(lambda *a: stepped.append(trainer.state.global_step))

    method = after_one_task(Replay, tmp_path)
    with pytest.raises(DivergenceError, match=rf"the gradient norm is {told} at optimiser step 2 of 6"):
        train(method, tmp_path, spoil, max_grad_norm=max_grad_norm)
    assert stepped == [0]


def test_a_loss_without_a_gradient_is_no_training(tmp_path: Path) -> None:
    """Normalisation turns activations that overflow into zeros: a model that answers all alike, with a finite loss."""

    def spoil(trainer: Any) -> None:
        final_norm = trainer.model.get_base_model().model.norm
        final_norm.register_forward_hook(
            lambda module, args, output: output * (0.0 if trainer.state.global_step == 3 else 1.0)
        )

    method = after_one_task(Sequential, tmp_path)
    with pytest.raises(
        DivergenceError, match=r"its loss is 4\.11 nats and the gradient .* is 0 .* at optimiser step 4 of 6"
    ):
        train(method, tmp_path, spoil)


class _BadReplay(Replay):
    @contextmanager
    def replay_terms(self, model: Any) -> Any:
        with super().replay_terms(model) as terms:
            yield ReplayTerms({"replay": Term(float("inf"), terms.parts["replay"].value)})


@pytest.mark.parametrize("replay_step", ["added", "separate"])
def test_a_bad_replay_loss_is_told_apart(tmp_path: Path, replay_step: str) -> None:
    method = after_one_task(_BadReplay, tmp_path, replay_step=replay_step)
    with pytest.raises(DivergenceError, match=r"the replay loss is inf at optimiser step 1 of 6"):
        train(method, tmp_path)


def test_a_bad_penalty_is_told_apart(tmp_path: Path) -> None:
    method = after_one_task(Ewc, tmp_path, mode="continue")
    method.penalty = lambda: next(iter(method.stack.parameters().values())).sum() * float("nan")
    with pytest.raises(DivergenceError, match=r"the penalty is nan at optimiser step 1 of 6"):
        train(method, tmp_path)


def test_a_scaler_may_skip_steps_but_not_for_ever(tmp_path: Path) -> None:
    method = after_one_task(Sequential, tmp_path)
    with method.task("new"):
        trainer = ContinualTrainer(model=method.model, method=method, args=arguments(tmp_path), train_dataset=NEW)
        trainer.accelerator.scaler = object()
        bad = torch.tensor(float("inf"))
        for _ in range(MOST_SKIPPED_STEPS):
            trainer._check_gradient_norm(bad)
        trainer._check_gradient_norm(torch.tensor(1.0))
        for _ in range(MOST_SKIPPED_STEPS):
            trainer._check_gradient_norm(bad)
        with pytest.raises(DivergenceError, match="the gradient norm is inf"):
            trainer._check_gradient_norm(bad)


def test_what_a_hand_written_loop_did_to_the_adapter_is_noticed_at_the_end(tmp_path: Path) -> None:
    method = after_one_task(Seekr, tmp_path)
    with pytest.raises(DivergenceError, match=r"task 'new' diverged: at its end its adapter holds .*lora_B;"):
        with method.task("new", replay_from=NEW):
            parameters = method.stack.parameters()
            next(value for path, value in parameters.items() if path.endswith("lora_B")).data[0, 0] = float("inf")
    assert method.task_names == ["old"]


def test_a_hand_written_loop_is_told_of_a_bad_replay_loss(tmp_path: Path) -> None:
    method = after_one_task(Seekr, tmp_path)
    with pytest.raises(DivergenceError, match=r"task 'new' diverged: the replay loss is nan at optimiser step 1;"):
        with method.task("new", replay_from=NEW, optimizer_steps=4):
            next(iter(method.stack.parameters().values())).data.fill_(float("nan"))
            method.replay_loss()


@pytest.mark.parametrize("name", ["sequential", "replay", "seekr", "lwf"])
def test_a_run_that_diverges_in_a_later_task_ends_with_one_line_and_keeps_the_earlier_ones(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ContinualTrainer.train

    def train_badly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.method.task_names) == 1:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 1e9
        return own(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "train", train_badly)
    recipe = small_recipe(tmp_path / "run", n_tasks=2)
    recipe["method"]["name"] = name
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert command("run", str(tmp_path / "recipe.yaml"), monkeypatch=monkeypatch) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "diverged" in line]
    assert len(told) == 1 and re.search(
        r"task 'last' diverged: .* at optimiser step \d of 6 with learning rate", told[0]
    )
    assert read_json(tmp_path / "run" / "state.json")["finished_tasks"] == 1
    assert [path.name for path in (tmp_path / "run" / "tasks").iterdir()] == ["01-first"]


def test_a_recipe_with_such_a_rate_can_be_run_again_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = str(tmp_path / "recipe.yaml")
    assert command("run", path, "training.learning_rate=1.0e+9", monkeypatch=monkeypatch) == 2
    assert command("run", path, monkeypatch=monkeypatch) == 0


def test_in_float32_too(tmp_path: Path) -> None:
    method = Sequential(adapted(tiny_llama(num_hidden_layers=2)), directory=tmp_path / "method")
    with pytest.raises(DivergenceError, match="task 'new' diverged"):
        train(method, tmp_path, learning_rate=1e9, lr_scheduler_type="constant")
    assert method.task_names == []


# What is no divergence, but no training either --------------------------------------------------------------------


def test_a_batch_without_any_label_is_told_as_that(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    data = [{**row, "labels": [-100] * len(row["labels"])} for row in NEW[:4]]
    with pytest.raises(DataError, match="no token of the batch at step 1 has a label"), method.task("new"):
        args = arguments(tmp_path / "out", max_steps=2)
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=data).train()


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_a_task_that_learnt_nothing_is_told(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method", adapter_mode=mode)
    for name, rate in (("still", 0.0), ("moved", 0.05)):
        with method.task(name):
            args = arguments(tmp_path / "out", max_steps=2, learning_rate=rate)
            ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW).train()
    told = [record.getMessage() for record in caplog.records if "nothing was learnt" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("task still: its adapter is what it was at the beginning")


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_noise_on_the_embeddings_ends_with_the_training(tmp_path: Path, ends: str) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    embeddings = method.model.get_input_embeddings()
    rate = 0.05 if ends == "well" else 1e9
    for _ in range(2):
        try:
            with method.task("new"):
                args = arguments(tmp_path / "out", max_steps=6, learning_rate=rate, neftune_noise_alpha=5.0)
                ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW).train()
        except DivergenceError:
            assert ends == "badly"
        assert len(embeddings._forward_hooks) == 0
        if ends == "well":
            return


def test_an_optimizer_with_weights_to_evaluate_at_is_told_to_show_them(tmp_path: Path) -> None:
    class ScheduleFree(torch.optim.SGD):
        shows = "training"

        def train(self) -> None:
            self.shows = "training"

        def eval(self) -> None:
            self.shows = "evaluation"

    method = Sequential(adapted(), directory=tmp_path / "method")
    with method.task("new"):
        optimizer = ScheduleFree(list(method.stack.parameters().values()), lr=0.01)
        args = arguments(tmp_path / "out", max_steps=2)
        ContinualTrainer(
            model=method.model, method=method, args=args, train_dataset=NEW, optimizers=(optimizer, None)
        ).train()
        assert optimizer.shows == "evaluation"


@pytest.mark.parametrize("by_steps", [True, False])
def test_the_rhythm_is_the_same_whichever_way_the_length_is_given(tmp_path: Path, by_steps: bool) -> None:
    method = after_one_task(Replay, tmp_path, replay_every=None, min_replay_passes=1)
    length = {"max_steps": 30} if by_steps else {"num_train_epochs": 10}
    with method.task("new", replay_from=NEW):
        args = arguments(tmp_path / "out", **length)
        trainer = ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW)
        trainer.train()
        # 22 samples in batches of 8: 3 steps an epoch, by whose size 30 steps are 10.9 epochs.
        assert trainer.state.global_step == 30
        assert method.rhythm.count(30) == (17 if by_steps else 15)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.max_steps=0", r"training\.max_steps must be a whole number above 0, or -1"),
        ("training.dataloader_drop_last=true tasks.max_train=4", r"dataloader_drop_last .* 4 samples .* batch of 8"),
    ],
)
def test_a_recipe_without_a_single_step_is_refused(
    tmp_path: Path, setting: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert command("run", str(tmp_path / "recipe.yaml"), *setting.split(), monkeypatch=monkeypatch) == 2
    assert re.search(told, " ".join(capsys.readouterr().err.split()))


def test_a_package_that_a_setting_needs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ImportError("You need liger-kernel")

    monkeypatch.setattr(ContinualTrainer, "train", missing)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path / "run", n_tasks=1)))
    assert command("run", str(tmp_path / "recipe.yaml"), monkeypatch=monkeypatch) == 2
    assert "training: You need liger-kernel" in capsys.readouterr().err
