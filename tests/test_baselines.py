"""The baselines: each penalty against a number worked by hand, and each through a run and its resumption."""

from __future__ import annotations

import io
import math
from collections import Counter
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from support.core_models import fresh_peft, logits_of, make_dataset, train_by_hand
from support.small_run import read_json, read_lines, small_recipe
from transformers import TrainingArguments

import seekr_peft.methods.registry as names_module
import seekr_peft.run.measuring as measuring_module
import seekr_peft.run.runner as run_module
from seekr_peft import run_recipe
from seekr_peft.config import SeekrConfig
from seekr_peft.errors import ConfigError, RunError
from seekr_peft.losses import label_loss, softened_kl
from seekr_peft.memory import choose_samples
from seekr_peft.methods import Ewc, Lwf, OLora, ReplayLogits, Sequential, get_method
from seekr_peft.methods.settings import EwcConfig, LwfConfig, OLoraConfig
from seekr_peft.model.answers import answer_logits
from seekr_peft.recipe import load_recipe
from seekr_peft.run.stages import count_steps, joined
from seekr_peft.training.trainer import ContinualTrainer

FIRST, SECOND = make_dataset(12, seed=1), make_dataset(12, seed=2)


def do_task(method: Any, name: str, dataset: list, steps: int = 4) -> None:
    with method.task(name, replay_from=dataset, optimizer_steps=steps):
        train_by_hand(method, dataset, steps)


# O-LoRA -----------------------------------------------------------------------------------------------------------


def test_olora_penalises_the_overlap_of_the_a_matrices() -> None:
    """One module, rank 1: A_earlier = 2 * (3, 4, 0, ...) with scaling 2, A_new = (1, 2, 0, ...): (6 + 16)^2."""
    lora = {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    method = OLora(fresh_peft(**lora), OLoraConfig(olora_lambda=0.5))
    with method.task("first"):
        (a, b) = (method.stack.parameters()[key] for key in sorted(method.stack.parameters()))
        a.data.zero_()
        a.data[0, :2] = torch.tensor([3.0, 4.0])
        b.data.fill_(1.0)
        assert method.penalty() is None
    with method.task("second"):
        a = method.stack.parameters()[min(method.stack.parameters())]
        a.data.zero_()
        a.data[0, :2] = torch.tensor([1.0, 2.0])
        penalty = method.penalty()
        assert float(penalty.detach()) == pytest.approx(0.5 * 22.0**2)
        (gradient,) = torch.autograd.grad(penalty, a)
        # d/da 0.5 * (w . a)^2 = (w . a) w with w = (6, 8, 0, ...).
        assert gradient[0, :3].tolist() == pytest.approx([22 * 6, 22 * 8, 0.0])


def test_olora_training_lowers_the_overlap() -> None:
    overlaps = []
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        method = OLora(fresh_peft(), OLoraConfig(olora_lambda=weight))
        do_task(method, "first", FIRST)
        with method.task("second"):
            optimizer = torch.optim.SGD(method.stack.parameters().values(), lr=0.01)
            for _ in range(5):
                penalty = method.penalty()
                if penalty is not None:
                    penalty.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            method.config = OLoraConfig(olora_lambda=1.0)
            overlaps.append(float(method.penalty().detach()))
    assert overlaps[1] < 0.9 * overlaps[0]


# EWC --------------------------------------------------------------------------------------------------------------


def test_ewc_holds_parameters_by_their_fisher_information() -> None:
    """Two parameters: F = (4, 1), moved by (0.5, 3): 10 / 2 * (4 * 0.25 + 1 * 9)."""
    method = Ewc(fresh_peft(), EwcConfig(ewc_lambda=10.0), adapter_mode="continue")
    with method.task("first", replay_from=FIRST):
        assert method.penalty() is None
        path, parameter = next(iter(method.stack.parameters().items()))
        fisher, value = torch.zeros_like(parameter), parameter.detach().clone()
        fisher[0, 0], fisher[0, 1] = 4.0, 1.0
        method._tasks.append(({path: fisher}, {path: value}))
        parameter.data[0, 0] += 0.5
        parameter.data[0, 1] += 3.0
        parameter.data[1, 0] += 99.0
        assert float(method.penalty().detach()) == pytest.approx(5.0 * (4 * 0.25 + 9.0), rel=1e-5)


def test_the_fisher_information_is_the_mean_square_of_each_samples_gradient(tmp_path: Path) -> None:
    method = Ewc(fresh_peft(), EwcConfig(ewc_samples=12), directory=tmp_path, adapter_mode="continue")
    do_task(method, "first", FIRST)
    fisher, values = method._tasks[0]
    parameters = dict(method.model.named_parameters())
    samples = choose_samples(FIRST, 1.0, 1, 0)
    assert len(samples) == 12
    path = next(path for path in fisher if path.endswith("lora_B"))
    parameter = next(p for name, p in parameters.items() if name.startswith(path) and "weight" in name)
    assert torch.equal(values[path], parameter)
    method.model.eval()
    parameter.requires_grad_(True)
    expected = torch.zeros_like(parameter)
    for sample in samples:
        ids = sample.input_ids[None]
        loss = label_loss(*answer_logits(method.model, ids, torch.ones_like(ids), sample.labels[None]))
        expected += torch.autograd.grad(loss, parameter)[0].square() / 12
    assert float(expected.max()) > 0
    # Scaled by one factor for all parameters, to a mean of 1.
    everything = torch.cat([value.flatten() for value in fisher.values()])
    assert float(everything.mean()) == pytest.approx(1.0, rel=1e-5)
    scale = fisher[path].max() / expected.max()
    torch.testing.assert_close(fisher[path], expected * scale, rtol=1e-4, atol=1e-6)


def test_ewc_is_restored_with_its_fisher_information(tmp_path: Path) -> None:
    method = Ewc(fresh_peft(), SeekrConfig(), directory=tmp_path, adapter_mode="continue")
    do_task(method, "first", FIRST)
    method.save_pretrained(tmp_path)
    again = Ewc.from_pretrained(fresh_peft(), tmp_path)
    for mine, other in zip(again._tasks[0], method._tasks[0], strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    (tmp_path / "tasks" / "01-first" / "fisher.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"fisher\.safetensors is not what was written"):
        Ewc.from_pretrained(fresh_peft(), tmp_path)


@pytest.mark.parametrize(("kind", "mode"), [(Ewc, "stack"), (OLora, "continue")])
def test_an_adapter_mode_in_which_the_method_means_nothing_is_refused(kind: Any, mode: Any) -> None:
    with pytest.raises(ConfigError, match=f"method '{kind.name}' needs adapter_mode .*got '{mode}'"):
        kind(fresh_peft(), adapter_mode=mode)


def test_ewc_asks_for_the_training_samples() -> None:
    method = Ewc(fresh_peft(), adapter_mode="continue")
    with pytest.raises(ConfigError, match="looks at the training samples"), method.task("first"):
        pass


# LwF --------------------------------------------------------------------------------------------------------------


def test_the_softened_divergence_is_the_number_worked_by_hand() -> None:
    """Two tokens, temperature 2: teacher logits (2 ln 3, 0) give (3/4, 1/4), the student's (0, 0) give (1/2, 1/2):
    3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; a second position where both agree halves the mean."""
    teacher = torch.tensor([[2 * math.log(3), 0.0], [1.0, -1.0]])
    student = torch.tensor([[0.0, 0.0], [1.0, -1.0]], requires_grad=True)
    loss = softened_kl(student, teacher, 2.0)
    assert float(loss.detach()) == pytest.approx(0.130812 / 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    # (softmax(s / t) - softmax(teacher / t)) / t, over two positions.
    assert gradient[0].tolist() == pytest.approx([(0.5 - 0.75) / 4, (0.5 - 0.25) / 4], abs=1e-6)


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_lwf_is_taught_by_the_model_before_the_task_on_its_own_samples(mode: Any) -> None:
    method = Lwf(fresh_peft(), LwfConfig(lwf_lambda=3.0, replay_batch_size=12), adapter_mode=mode)
    with method.task("first", replay_from=FIRST):
        assert not method.replay_due(0)
        train_by_hand(method, FIRST, 4)
    before = logits_of(method.model)
    with method.task("second", replay_from=SECOND):
        assert all(method.replay_due(step) for step in range(3))
        with method.replay_terms(method.model) as terms:
            # Nothing was trained yet: the student is its own teacher.
            assert float(terms.total.detach()) == pytest.approx(0.0, abs=1e-6)
        parameter = next(p for path, p in method.stack.parameters().items() if path.endswith("lora_B"))
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        moved = logits_of(method.model)
        assert not torch.equal(moved, before)
        with method.replay_terms(method.model) as terms:
            value = float(terms.parts["logits"].value.detach())
            assert value > 0 and float(terms.total.detach()) == pytest.approx(3 * value, rel=1e-6)
            assert torch.autograd.grad(terms.total, parameter)[0].abs().max() > 0
        assert torch.equal(logits_of(method.model), moved), "looking at the teacher must not change the student"
        samples = choose_samples(SECOND, 1.0, 1, 0)
        expected, count = 0.0, 0
        for sample in samples:
            inputs = (sample.input_ids[None], torch.ones_like(sample.input_ids)[None], sample.labels[None])
            with torch.no_grad():
                student = answer_logits(method.model, *inputs)[0].double()
                with method.stack.before_task():
                    teacher = answer_logits(method.model, *inputs)[0].double()
            p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
            expected, count = expected + float((p * (p / q).log()).sum()), count + len(p)
        assert value == pytest.approx(expected / count, rel=1e-4)


def test_lwf_draws_every_sample_once_a_pass() -> None:
    method = Lwf(fresh_peft(), LwfConfig(replay_batch_size=4))
    do_task(method, "first", FIRST)
    with method.task("second", replay_from=SECOND):
        drawn = [tuple(row.tolist()) for _ in range(3) for row in next(method._stream).input_ids]
        lengths = {len(row["input_ids"]) for row in SECOND}
        assert len(set(drawn)) == 12 and len(lengths) >= 1


# Multitask --------------------------------------------------------------------------------------------------------


def test_the_steps_of_a_training_are_counted_as_the_trainer_counts_them(tmp_path: Path) -> None:
    for size, accumulation, epochs in [(3, 1, 2.0), (4, 2, 1.5), (5, 4, 1.0), (40, 1, 3.0)]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs,
            use_cpu=True,
            report_to=[],
        )
        method = Sequential(fresh_peft())
        with method.task("only"):
            trainer = ContinualTrainer(model=method.model, method=method, args=arguments, train_dataset=FIRST)
            trainer.train()
            assert count_steps(len(FIRST), arguments) == trainer.state.global_step


@pytest.mark.parametrize(
    ("epochs", "max_steps", "rows", "steps"),
    # 8 and 4 samples in batches of 4: two steps and one an epoch.
    [
        ((2.0, 3.0), -1, (8, 6), 7),
        ((3.0, 3.0), -1, (8, 4), 9),
        ((5.0, 2.0), -1, (20, 4), 12),
        ((1.0, 9.0), 6, (8, 8), 12),
    ],
)
def test_the_mixture_gives_each_task_its_share_of_the_steps(
    epochs: tuple[float, float], max_steps: int, rows: tuple[int, int], steps: int, tmp_path: Path
) -> None:
    sets = [
        Dataset.from_dict(
            {
                "input_ids": [[k, i] for i in range(n)],
                "attention_mask": [[1, 1]] * n,
                "labels": [[k, i] for i in range(n)],
            }
        )
        for k, n in enumerate((8, 4))
    ]
    arguments = [
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=count,
            max_steps=max_steps,
            use_cpu=True,
            report_to=[],
        )
        for count in epochs
    ]
    mixed, own = joined(sets, arguments)
    tasks = [row[0] for row in mixed["input_ids"]]
    assert (tasks.count(0), tasks.count(1)) == rows and own.max_steps == steps
    counts = Counter(map(tuple, mixed["input_ids"]))
    for k in (0, 1):
        own_counts = [count for row, count in counts.items() if row[0] == k]
        assert max(own_counts) - min(own_counts) <= 1


@pytest.mark.slow
def test_multitask_trains_all_tasks_at_once_for_the_steps_of_the_sequence(tmp_path: Path) -> None:
    settings = small_recipe(tmp_path / "run", method={"name": "multitask"})
    settings["training"] = {"learning_rate": 2e-3, "per_device_train_batch_size": 8}
    settings["tasks"]["epochs"] = [1, 2, 1]
    result = run_recipe(settings, console=Console(file=io.StringIO()))
    # 40 samples a task in batches of 8: 5 + 10 + 5 steps.
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == 20 and {line["task"] for line in lines} == {"all_tasks"}
    scores = result.matrix.scores
    assert [row[-1] is not None for row in scores] == [True] * 3
    assert all(value is None for row in scores for value in row[:-1])
    assert result.matrix.to_dict()["bwt"] is None and result.matrix.op() >= 0
    assert read_json(tmp_path / "run" / "state.json")["finished_tasks"] == 3
    costs = read_json(tmp_path / "run" / "costs.json")["tasks"]
    assert [cost["n_steps"] for cost in costs] == [20]
    assert (tmp_path / "run" / "report.html").is_file()


# Replay with logits -----------------------------------------------------------------------------------------------


def test_replay_with_logits_is_seekr_without_attention() -> None:
    method = ReplayLogits(fresh_peft(), SeekrConfig(replay_ratio=0.3))
    do_task(method, "first", FIRST)
    assert not method.selections and not method.memory.tasks[0].selection
    with method.task("second", replay_from=SECOND), method.replay_terms(method.model) as terms:
        assert set(terms.values()) == {"replay_loss", "logits_loss"}


# All of them, through a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replay_logits", "lwf", "ewc", "olora", "multitask"])
def test_a_run_on_a_4_bit_base_logs_its_terms_and_resumes_to_the_same_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "write_report", lambda directory: directory / "report.html")
    mode = "continue" if name == "ewc" else "stack"

    def recipe(folder: str) -> dict[str, Any]:
        settings = small_recipe(tmp_path / folder, n_tasks=2, model={"name_or_path": "demo", "quantization": "nf4"})
        settings["method"] = {**settings["method"], "name": name}
        settings["adapter"] = {**settings["adapter"], "mode": mode}
        return settings

    def run(folder: str, **options: Any) -> Any:
        return run_recipe(recipe(folder), console=Console(file=io.StringIO()), **options)

    run("whole")
    term = {"replay_logits": "logits_loss", "lwf": "logits_loss", "multitask": "loss"}.get(name, "penalty_loss")
    stage = 0 if name == "multitask" else 1
    terms = [line.get(term) for line in read_lines(tmp_path / "whole" / "metrics.jsonl") if line["task_index"] == stage]
    assert any(value is not None and value > 0 for value in terms)

    # Stopped after the first task was trained and saved.
    evaluate, calls = measuring_module.evaluate_task, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(measuring_module, "evaluate_task", stop)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(measuring_module, "evaluate_task", evaluate)
    run("stopped", resume=True)
    files = [tmp_path / folder / "adapter" / "adapter_model.safetensors" for folder in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_json(tmp_path / "stopped" / "state.json")["status"] == "finished"


# Methods of other packages ----------------------------------------------------------------------------------------


class Outside(Sequential):
    """What another package might register."""

    name = "outside"


def test_a_method_of_another_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("outside", f"{__name__}:Outside", names_module.ENTRY_POINT_GROUP)
    wrong = EntryPoint("wrong", "pathlib:Path", names_module.ENTRY_POINT_GROUP)
    monkeypatch.setattr(names_module, "entry_points", lambda group: [point, wrong])
    assert get_method("outside") is Outside
    settings = {**small_recipe(tmp_path), "method": {"name": "outside"}}
    assert load_recipe(settings).method_name == "outside"
    with pytest.raises(ConfigError, match=r"'wrong' of group 'seekr_peft\.methods' is pathlib:Path"):
        get_method("wrong")
    with pytest.raises(ConfigError, match="method 'nothing' is unknown; choose one of sequential, replay"):
        get_method("nothing")


def test_the_names_that_recipes_accept_are_the_methods() -> None:
    assert [get_method(name).name for name in names_module.OWN_METHODS] == list(names_module.OWN_METHODS)


def test_a_baseline_changes_the_model() -> None:
    method = OLora(fresh_peft())
    before = logits_of(method.model)
    do_task(method, "first", FIRST)
    assert not torch.equal(logits_of(method.model), before)


def test_the_adapter_modes_that_a_recipe_is_checked_against_are_the_methods_own() -> None:
    own = {name: get_method(name).adapter_modes for name in names_module.OWN_METHODS}
    assert {name: modes for name, modes in own.items() if len(modes) < 2} == names_module.ADAPTER_MODES
