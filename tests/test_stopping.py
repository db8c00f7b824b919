"""SIGINT and SIGTERM: a run ends at its next step, with a checkpoint, a line that says how to go on, and 130 or 143."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.runs import assert_same_result
from support.small_run import read_json, small_recipe

import seekr_peft.run.measuring as measuring_module
import seekr_peft.run.runner as run_module
from seekr_peft import ContinualTrainer, Seekr, run_recipe
from seekr_peft.training.stopping import RunStopped, StopRequest, listening

SAVING = {"training": {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 4,
                       "save_strategy": "steps", "save_steps": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(small_recipe(directory), console=Console(quiet=True), report=False)
    return directory


def signalled(recipe: Any, number: int, target: Any, name: str, when: Any, **options: Any) -> RunStopped:
    """Run until ``when`` of a call of ``target.name``, which sends this process a signal first."""
    original = getattr(target, name)

    def sending(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(target, name, sending)
        with pytest.raises(RunStopped) as caught:
            run_recipe(recipe, console=Console(quiet=True), report=False, **options)
    return caught.value


def in_step(step: int, task: str) -> Any:
    return lambda trainer, *args, **kwargs: trainer.method.current_task == task and trainer.state.global_step == step


def evaluating(name: str) -> Any:
    return lambda model, tokenizer, task, **kwargs: task.name == name


MOMENTS = {
    "in a step": (ContinualTrainer, "training_step", in_step(2, "last"), 1, ["02-last/checkpoint-3"]),
    "in the last step": (ContinualTrainer, "training_step", in_step(5, "last"), 1, ["02-last/checkpoint-6"]),
    "while heads are scored": (Seekr, "_score_and_select", lambda method: method.current_task == "last", 2, []),
    "while it is evaluated": (measuring_module, "evaluate_task", evaluating("last"), 2, []),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_run_that_is_stopped_goes_on_to_the_same_end(
    moment: str, number: int, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, name, when, n_trained, checkpoints = MOMENTS[moment]
    recipe = small_recipe(tmp_path / "run")
    before = signal.getsignal(number)
    stop = signalled(recipe, number, target, name, when)
    assert stop.code == 128 + number and signal.getsignal(number) is before
    advice = f"go on with: seekr-peft run {tmp_path / 'run' / 'recipe.yaml'} --resume"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"seekr-peft: stopped by {signal.Signals(number).name}; {advice}"
    assert len(read_json(tmp_path / "run" / "method.json")["tasks"]) == n_trained
    found = [
        path.relative_to(tmp_path / "run" / "checkpoints").as_posix() for path in tmp_path.glob("run/checkpoints/*/*")
    ]
    assert found == checkpoints
    run_recipe(tmp_path / "run" / "recipe.yaml", resume=True, console=Console(quiet=True), report=False)
    assert_same_result(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "checkpoints").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_kill_loses_at_most_the_steps_since_the_last_checkpoint(step: int, tmp_path: Path, whole: Path) -> None:
    recipe = small_recipe(tmp_path / "run", **SAVING)
    original, steps = ContinualTrainer.training_step, []

    def killed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if in_step(step, "third")(trainer):
            raise Killed
        return original(trainer, *args, **kwargs)

    def counted(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(trainer.state.global_step)
        return original(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ContinualTrainer, "training_step", killed)
        with pytest.raises(Killed):
            run_recipe(recipe, console=Console(quiet=True), report=False)
        patched.setattr(ContinualTrainer, "training_step", counted)
        run_recipe(recipe, resume=True, console=Console(quiet=True), report=False)
    assert steps == list(range(step - step % 2, 6))
    # Whether checkpoints are kept changes nothing but the recipe.
    matrix = "accuracy_matrix.json"
    assert (tmp_path / "run" / matrix).read_bytes() == (whole / matrix).read_bytes()
    for path in whole.glob("tasks/*/*/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(whole)).read_bytes(), path
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_that_was_stopped_in_its_first_task_is_not_begun_anew_without_a_word(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    signalled(recipe, signal.SIGTERM, ContinualTrainer, "training_step", in_step(2, "first"))
    with pytest.raises(run_module.RunError, match="already holds a run; go on with --resume"):
        run_recipe(recipe, console=Console(quiet=True), report=False)
    assert run_recipe(recipe, resume="auto", console=Console(quiet=True), report=False).matrix.op() >= 0


def test_a_damaged_checkpoint_is_named_and_repaired(tmp_path: Path, whole: Path) -> None:
    from support.damages import flip

    from seekr_peft.run.repair import repair

    recipe = small_recipe(tmp_path / "run")
    signalled(recipe, signal.SIGTERM, ContinualTrainer, "training_step", in_step(2, "last"))
    damaged = tmp_path / "run" / "checkpoints" / "02-last" / "checkpoint-3" / "training.safetensors"
    flip(damaged)
    with pytest.raises(run_module.RunError, match=str(damaged)):
        run_recipe(recipe, resume=True, console=Console(quiet=True), report=False)
    done = repair(tmp_path / "run")
    assert done.kept == ["first"] and done.aside is not None
    assert (done.aside / "checkpoints" / "02-last" / "checkpoint-3" / "training.safetensors").is_file()
    run_recipe(recipe, resume=True, console=Console(quiet=True), report=False)
    shutil.rmtree(done.aside)
    assert_same_result(tmp_path / "run", whole)


# Whole processes ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "seekr_peft", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_ends_with_the_signals_status(number: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path / "run")))
    lines = []
    with command("run", str(tmp_path / "recipe.yaml")) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith("trained 1/3"):
                process.send_signal(number)
    assert process.returncode == 128 + number
    assert lines[-1].startswith(f"seekr-peft: stopped by {signal.Signals(number).name}; go on with: seekr-peft run ")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_a_command_that_is_stopped_while_it_starts_says_so(seconds: float, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path / "run")))
    with command("run", str(tmp_path / "recipe.yaml")) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
    assert (process.returncode, text) == (
        143,
        "seekr-peft: stopped by SIGTERM; nothing was lost, give the same command again\n",
    )


# The request itself -------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_the_end_of_what_must_not_be_broken_off() -> None:
    request, done = StopRequest(), []
    with pytest.raises(RunStopped) as caught, request.at_the_next_step():
        with request.at_the_next_step():
            request._take(signal.SIGTERM, None)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"] and caught.value.code == 143
    with pytest.raises(RunStopped):
        request.check()


def test_a_second_signal_does_not_wait() -> None:
    request, done = StopRequest(), []
    with pytest.raises(RunStopped), request.at_the_next_step():
        request._take(signal.SIGINT, None)
        request._take(signal.SIGINT, None)
        done.append("never")
    assert done == []


def test_listening_is_once_and_leaves_the_handlers_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RunStopped) as caught, listening() as outer, listening() as inner:
        assert outer is inner
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except RunStopped as stop:
            stop.go_on_with("like this")
            raise
    assert caught.value.code == 143
    assert capsys.readouterr().err == "seekr-peft: stopped by SIGTERM; like this\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_changed(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            run_recipe(small_recipe(tmp_path / "run", n_tasks=1), console=Console(quiet=True), report=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []


def test_a_demo_or_a_comparison_says_what_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from seekr_peft.compare import compare
    from seekr_peft.demo.run import run_demo

    def stopped(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    recipe = small_recipe(tmp_path / "compared", n_tasks=1)
    for call, advice in (
        (lambda: compare(recipe, console=Console(quiet=True)), "the same command goes on"),
        (lambda: run_demo(tmp_path / "demo", Console(quiet=True)), "the same command starts it again"),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(run_module, "load_model", stopped)
            with pytest.raises(RunStopped):
                call()
        assert capsys.readouterr().err.splitlines()[-1] == f"seekr-peft: stopped by SIGTERM; {advice}"
