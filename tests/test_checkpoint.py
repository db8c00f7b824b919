"""Checkpoints inside a task: a training that was stopped and gone on with ends bit for bit like one that was not."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.checkpoints import FIRST, SECOND, Killed, arguments, trainer
from support.tiny_models import tiny_llama
from transformers import EarlyStoppingCallback, set_seed

from seekr_peft import ContinualTrainer, Seekr, SeekrConfig
from seekr_peft.errors import ConfigError, RunError
from seekr_peft.methods import get_method
from seekr_peft.training.checkpoint import load_training, random_state, save_training, set_random_state

CONFIG = SeekrConfig(replay_ratio=0.25, layer_budget=2, head_budget=5, query_budget=6, min_replay_passes=3)


def method_in(directory: Path, name: str = "seekr", **options: Any) -> Any:
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(3)
    return get_method(name)(get_peft_model(tiny_llama(), lora), CONFIG, directory=directory, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def whole_and_resumed(
    folder: Path, name: str, stop_after: int, args: dict[str, Any], **options: Any
) -> tuple[Any, Any]:
    """Two tasks without a stop; and with one in the second, which a new process goes on with. The files that each
    left, and what it logged after the place where the second one went on."""
    method = method_in(folder / "whole", name, **options)
    with method.task("first", FIRST):
        trainer(method, arguments(folder / "a", save_strategy="no"), FIRST).train()
    with method.task("second", SECOND):
        whole = trainer(method, arguments(folder / "b", **args), SECOND)
        whole.train()
    method = method_in(folder / "resumed", name, **options)
    with method.task("first", FIRST):
        trainer(method, arguments(folder / "c", save_strategy="no"), FIRST).train()
    with pytest.raises(Killed), method.task("second", SECOND):
        trainer(method, arguments(folder / "d", **args), SECOND, stop_after).train()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    again = type(method).from_pretrained(get_peft_model(tiny_llama(), lora), folder / "resumed")
    with again.task("second", SECOND):
        resumed = trainer(again, arguments(folder / "d", **args), SECOND)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.logged and resumed.logged[0][0] > 1
    tail = [entry for entry in whole.logged if entry[0] >= resumed.logged[0][0]]
    assert resumed.logged == tail, "the logged losses too, also the first one, which began before the checkpoint"
    return files_of(folder / "whole"), files_of(folder / "resumed")


@pytest.mark.parametrize("name", ["seekr", "replay", "replay_logits", "sequential", "lwf", "ewc", "olora"])
def test_every_method_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = {"adapter_mode": "continue"} if name == "ewc" else {}
    whole, resumed = whole_and_resumed(tmp_path, name, 12, {}, **options)
    assert whole.keys() == resumed.keys()
    assert [file for file in whole if whole[file] != resumed[file]] == []


@pytest.mark.parametrize(
    ("args", "stop_after"),
    [
        ({"gradient_accumulation_steps": 2, "save_steps": 2}, 5),
        ({"save_steps": 6}, 7),
        ({"save_strategy": "epoch"}, 13),
        ({"optim": "sgd", "lr_scheduler_type": "linear"}, 9),
        ({"optim": "adafactor"}, 9),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, 9),
        ({"max_grad_norm": 0.01, "warmup_steps": 8}, 9),
        ({"train_sampling_strategy": "group_by_length"}, 9),
        ({"accelerator_config": {"use_seedable_sampler": False}}, 9),
        ({"accelerator_config": {"use_seedable_sampler": False}, "save_steps": 6}, 13),
        ({"max_steps": 16, "save_steps": 4}, 11),
        ({"bf16": True}, 9),
        ({"dataloader_drop_last": True, "gradient_accumulation_steps": 4, "save_steps": 1}, 2),
        ({"save_total_limit": 1, "save_steps": 2}, 9),
    ],
    ids=str,
)
def test_every_way_of_training_ends_bit_for_bit(args: dict[str, Any], stop_after: int, tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(tmp_path, "seekr", stop_after, args)
    assert [file for file in whole if whole[file] != resumed[file]] == []


@pytest.mark.parametrize("mode", ["stack", "continue"])
def test_replay_in_steps_of_its_own_ends_bit_for_bit(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(f"{__name__}.CONFIG", replace(CONFIG, replay_step="separate"))
    whole, resumed = whole_and_resumed(tmp_path, "seekr", 12, {}, adapter_mode=mode)
    assert [file for file in whole if whole[file] != resumed[file]] == []


def test_a_precision_is_what_each_trainer_asked_for(tmp_path: Path) -> None:
    method = method_in(tmp_path / "method", "sequential")
    linear = next(module for module in method.model.modules() if type(module) is torch.nn.Linear)
    seen: list[list[torch.dtype]] = []
    linear.register_forward_hook(lambda module, given, output: seen[-1].append(output.dtype))
    for task, half in (("a", False), ("b", True), ("c", False), ("d", True)):
        seen.append([])
        with method.task(task):
            trainer(method, arguments(tmp_path / task, bf16=half, save_strategy="no", max_steps=2), FIRST).train()
            seen.append([])
    kinds = [set(seen[2 * i]) for i in range(4)]
    assert kinds == [{torch.float32}, {torch.bfloat16}, {torch.float32}, {torch.bfloat16}]


# What is kept, and what is refused ----------------------------------------------------------------------------------


def stopped(tmp_path: Path, stop_after: int = 12, **settings: Any) -> Any:
    """A method whose second task, "second", was stopped; its checkpoints are in ``out``."""
    method = method_in(tmp_path / "method")
    with method.task("first", FIRST):
        trainer(method, arguments(tmp_path / "first", save_strategy="no"), FIRST).train()
    with pytest.raises(Killed), method.task("second", SECOND):
        trainer(method, arguments(tmp_path / "out", **settings), SECOND, stop_after).train()
    return method


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    files = {
        path.relative_to(tmp_path / "out" / "checkpoint-5").as_posix() for path in tmp_path.rglob("checkpoint-5/**/*")
    }
    names = {"training.json", "training.safetensors", "trainer_state.json", "manifest.json", "adapter"}
    assert files == names | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_only_as_many_as_asked_for_are_kept(tmp_path: Path) -> None:
    stopped(tmp_path, save_total_limit=1, save_steps=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-12"]


def test_a_checkpoint_of_the_adapter_alone_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    method = stopped(tmp_path, save_only_model=True)
    with pytest.raises(RunError, match=r"checkpoint-10 holds no optimizer \(save_only_model was set\)"):
        with method.task("second", SECOND):
            trainer(method, arguments(tmp_path / "out"), SECOND).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_task_is_refused_and_passed_over(tmp_path: Path) -> None:
    method = stopped(tmp_path)
    with pytest.raises(ConfigError, match="has no checkpoint of task 'third'"), method.task("third", SECOND):
        trainer(method, arguments(tmp_path / "out"), SECOND).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="is of task 'second', and 'third' is being trained"):
        with method.task("third", SECOND):
            made = trainer(method, arguments(tmp_path / "out"), SECOND)
            made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    other = method_in(tmp_path / "other")
    with pytest.raises(ConfigError, match="was made after other earlier tasks"), other.task("second", SECOND):
        made = trainer(other, arguments(tmp_path / "out"), SECOND)
        made.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-5")
    assert method.task_names == ["first"] and other.task_names == []


@pytest.mark.parametrize("other", [{"learning_rate": 1e-3}, {"gradient_accumulation_steps": 2}, {"seed": 7}], ids=str)
def test_a_training_goes_on_with_the_settings_that_it_began_with(other: dict[str, Any], tmp_path: Path) -> None:
    method = stopped(tmp_path)
    (name,) = other
    with pytest.raises(ConfigError, match=f"checkpoint-10 was made with {name}="), method.task("second", SECOND):
        trainer(method, arguments(tmp_path / "out", **other), SECOND).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="was made with samples=18, this training has 17"):
        with method.task("second", SECOND):
            trainer(method, arguments(tmp_path / "out"), SECOND[:17]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("path", [".", "nowhere", "out"])
def test_what_is_no_checkpoint_is_refused(path: str, tmp_path: Path) -> None:
    method = method_in(tmp_path / "method")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="is no checkpoint of a ContinualTrainer"), method.task("first", FIRST):
        made = trainer(method, arguments(tmp_path / "out"), FIRST)
        made.train(resume_from_checkpoint=str(tmp_path / path))


@pytest.mark.parametrize(
    "name",
    [
        "training.json", "training.safetensors", "trainer_state.json", "manifest.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(name: str, damage: str, tmp_path: Path, stopped_once: Path) -> None:
    shutil.copytree(stopped_once, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "checkpoint-10" / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        path.write_bytes(whole[:middle] if damage == "cut" else flipped)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    method = Seekr.from_pretrained(get_peft_model(tiny_llama(), lora), tmp_path / "copy" / "method")
    with pytest.raises(RunError, match=f"checkpoint-10/{name}"), method.task("second", SECOND):
        trainer(method, arguments(tmp_path / "copy" / "out"), SECOND).train(resume_from_checkpoint=True)
    if damage != "flipped" or name != "training.json":
        return
    with method.task("second", SECOND):
        made = trainer(method, arguments(tmp_path / "copy" / "out"), SECOND)
        assert made.train(resume_from_checkpoint=tmp_path / "copy" / "out" / "checkpoint-5").global_step == 18


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    stopped(folder)
    return folder


# The format ---------------------------------------------------------------------------------------------------------


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(st.dictionaries(st.text(max_size=3), NESTED, max_size=4))
@settings(max_examples=60)
def test_a_state_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("state")
    view = torch.arange(6.0).view(2, 3).T
    state = {
        **state,
        "tensors": [torch.tensor(3.5), view, view[0], torch.ones(2, dtype=torch.bfloat16), torch.zeros(0)],
    }
    save_training(folder, state)
    assert same(load_training(folder), state)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot hold <object object at .* \(object, at optimizer/state/0\)"):
        save_training(tmp_path, {"optimizer": {"state": [object()]}})


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.gauss(), np.random.randn()
    state = random_state()
    save_training(tmp_path, state)
    drawn = draw()
    set_random_state(load_training(tmp_path))
    assert draw() == drawn


def test_a_first_task_goes_on_in_a_method_made_anew(tmp_path: Path) -> None:
    results = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "stopped", 7)):
        method = method_in(folder / "method")
        if stop is not None:
            with pytest.raises(Killed), method.task("first", FIRST):
                trainer(method, arguments(folder / "out"), FIRST, stop).train()
            torch.manual_seed(77)
            lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
            method = Seekr(get_peft_model(tiny_llama(), lora), CONFIG, directory=folder / "method")
        with method.task("first", FIRST):
            trainer(method, arguments(folder / "out"), FIRST).train(resume_from_checkpoint=stop is not None)
        results.append(files_of(folder / "method"))
    assert results[0] == results[1]


def test_a_checkpoint_with_evaluations_and_early_stopping_goes_on(tmp_path: Path) -> None:
    """The best checkpoint is known after the stop too."""
    settings = {
        "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    results = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "stopped", 12)):
        method = method_in(folder / "method", "sequential")

        def made(out: Path, stop_after: int | None, method: Any = method) -> Any:
            built = ContinualTrainer(
                method=method,
                args=arguments(out, **settings),
                train_dataset=FIRST,
                eval_dataset=SECOND[:6],
                callbacks=[EarlyStoppingCallback(2, 99.0)],
            )
            step = built.training_step

            def stopping(*given: Any, **more: Any) -> Any:
                if built.state.global_step == stop_after:
                    raise Killed
                return step(*given, **more)

            built.training_step = stopping
            return built

        if stop is not None:
            with pytest.raises(Killed), method.task("first"):
                made(folder / "out", stop).train()
        with method.task("first"):
            trained = made(folder / "out", None)
            trained.train(resume_from_checkpoint=stop is not None)
        assert trained.state.global_step == 15, "patience ran out: no evaluation is better by 99"
        results.append((files_of(folder / "method"), Path(trained.state.best_model_checkpoint).name))
    assert results[0] == results[1]


# What was found from outside ------------------------------------------------------------------------------------------


def test_the_best_checkpoint_of_another_task_is_none_of_this_ones(tmp_path: Path) -> None:
    method = method_in(tmp_path / "method", "sequential")
    with method.task("first"):
        trainer(method, arguments(tmp_path / "out", save_steps=2, max_steps=6), FIRST).train()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 8}
    with method.task("second"):
        made = ContinualTrainer(
            method=method,
            args=arguments(tmp_path / "out", max_steps=8, metric_for_best_model="loss", **settings),
            train_dataset=SECOND,
            eval_dataset=SECOND[:4],
        )
        losses = iter([3.0, 1.0, 2.0, 2.5])
        made.evaluate = lambda *given, **more: {"eval_loss": next(losses, 9.0)}
        made._evaluate = lambda *given, **more: made.evaluate()
        made.train()
        # Step 4 was the best one and was not saved; checkpoint-4 is the first task's.
        assert made.state.best_global_step == 4 and made.state.best_model_checkpoint is None


@pytest.mark.parametrize(
    "other",
    [{"label_smoothing_factor": 0.1}, {"bf16": True}, {"lr_scheduler_kwargs": {"num_cycles": 1}}, {"adam_beta1": 0.5}],
    ids=str,
)
def test_no_setting_that_changes_a_number_may_be_another_one(
    other: dict[str, Any], tmp_path: Path, stopped_once: Path
) -> None:
    shutil.copytree(stopped_once, tmp_path / "copy")
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    method = Seekr.from_pretrained(get_peft_model(tiny_llama(), lora), tmp_path / "copy" / "method")
    (name,) = other
    for args, data, message in (
        (other, SECOND, f"was made with {name}="),
        ({}, [*SECOND[:-1], FIRST[0]], "was made with digest of samples="),
        ({"ignore_data_skip": True}, SECOND, "ignore_data_skip"),
    ):
        with pytest.raises(ConfigError, match=message), method.task("second", data):
            trainer(method, arguments(tmp_path / "copy" / "out", **args), data).train(resume_from_checkpoint=True)
    harmless = {"logging_steps": 3, "save_steps": 4, "save_total_limit": 3, "dataloader_num_workers": 0}
    with method.task("second", SECOND):
        trainer(method, arguments(tmp_path / "copy" / "out", **harmless), SECOND).train(resume_from_checkpoint=True)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(SECOND)


def stream_stopped(folder: Path, stop_after: int | None) -> tuple[Any, Any]:
    method = method_in(folder / "method", "sequential")
    args = {"max_steps": 12, "save_steps": 2}
    if stop_after is not None:
        with pytest.raises(Killed), method.task("first"):
            trainer(method, arguments(folder / "out", **args), Stream(), stop_after).train()
    return method, args


def test_a_stream_goes_on_in_its_first_pass(tmp_path: Path) -> None:
    """Six batches a pass."""
    results = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "stopped", 5)):
        method, args = stream_stopped(folder, stop)
        with method.task("first"):
            made = trainer(method, arguments(folder / "out", **args), Stream())
            made.train(resume_from_checkpoint=stop is not None)
        results.append(files_of(folder / "method"))
    assert results[0] == results[1]


def test_nothing_leads_back_into_a_later_pass_of_a_stream(tmp_path: Path) -> None:
    method, args = stream_stopped(tmp_path, 9)
    with pytest.raises(ConfigError, match="made in pass 2 through a stream"), method.task("first"):
        trainer(method, arguments(tmp_path / "out", **args), Stream()).train(resume_from_checkpoint=True)


def test_a_callback_that_is_left_out_after_the_stop_is_no_error(tmp_path: Path) -> None:
    method = method_in(tmp_path / "method", "sequential")

    settings = {"eval_dataset": FIRST[:2]}
    with pytest.raises(Killed), method.task("first"):
        built = ContinualTrainer(
            method=method,
            args=arguments(tmp_path / "out", eval_strategy="steps", eval_steps=5, metric_for_best_model="loss",
                           load_best_model_at_end=True),
            train_dataset=FIRST, callbacks=[EarlyStoppingCallback(9)], **settings,
        )  # fmt: skip
        step = built.training_step

        def stopping(*given: Any, **more: Any) -> Any:
            if built.state.global_step == 12:
                raise Killed
            return step(*given, **more)

        built.training_step = stopping
        built.train()
    with method.task("first"):
        trainer(method, arguments(tmp_path / "out"), FIRST).train(resume_from_checkpoint=True)


def test_workers_that_last_are_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = method_in(tmp_path / "method", "sequential")
    args = arguments(tmp_path / "out", dataloader_num_workers=1, dataloader_persistent_workers=True)
    with method.task("first"):
        assert not trainer(method, args, FIRST).args.dataloader_persistent_workers
        with torch.no_grad():
            next(iter(method.stack.parameters().values())).add_(1)
    assert "persistent_workers is switched off" in caplog.text


def test_checkpoints_of_other_trainers_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = stopped(tmp_path)
    (tmp_path / "out" / "checkpoint-900").mkdir()
    (tmp_path / "out" / "checkpoint-900" / "optimizer.pt").write_bytes(b"x")
    with method.task("second", SECOND):
        trainer(method, arguments(tmp_path / "out"), SECOND).train(resume_from_checkpoint=True)
    assert "checkpoint-900 is passed over" in caplog.text
