"""A kill at any moment costs at most the task in progress: a run that is resumed ends bit for bit like one that was
never stopped, or says why it cannot go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.runs import (
    FULL_DISK,
    Killed,
    assert_same_result,
    before_evaluating_task_2,
    run,
    stop_at,
    stopped_after_one_task,
)
from support.small_run import read_json, read_lines, small_recipe

import seekr_peft.methods.saved as saved_module
import seekr_peft.run.measuring as measuring_module
import seekr_peft.run.runner as run_module
from seekr_peft import ContinualTrainer, Seekr, run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import ConfigError, RunError
from seekr_peft.files.manifest import Ledger
from seekr_peft.memory import storage
from seekr_peft.recipe import load_recipe
from seekr_peft.run.records import RunRecords
from seekr_peft.run.task_data import load_tasks


def _in_step_5_of_task_3(trainer: Any, *args: Any, **kwargs: Any) -> bool:
    return trainer.method.current_task == "third" and trainer.state.global_step == 5


def _before_task_3_counts_as_finished(self: Any, names: list[str], finished: int) -> bool:
    return finished == 3


def _after_task_2_is_on_disk(self: Any, directory: Path) -> bool:
    return len(self.task_names) == 2


STOPS = {
    "in the middle of training task 3": (ContinualTrainer, "training_step", _in_step_5_of_task_3),
    "between training and evaluating task 2": (measuring_module, "evaluate_task", before_evaluating_task_2),
    "after the last evaluation": (RunRecords, "write_state", _before_task_3_counts_as_finished),
    "before a trained task is listed": (Seekr, "_write_state", _after_task_2_is_on_disk),
}


@pytest.mark.parametrize("moment", list(STOPS))
def test_a_run_that_was_stopped_and_resumed_ends_bitwise_like_one_that_was_not(
    moment: str, tmp_path: Path, finished: Path, no_report: None
) -> None:
    target, name, condition = STOPS[moment]
    recipe = small_recipe(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, target, name, condition)
        with pytest.raises(Killed):
            run(recipe)
    assert read_json(tmp_path / "run" / "state.json")["status"] == "running"
    result = run(recipe, resume=True)
    assert_same_result(result.directory, finished)


def test_a_full_disk_is_told_in_a_sentence_and_costs_the_task_in_progress(
    tmp_path: Path, finished: Path, no_report: None
) -> None:
    recipe = small_recipe(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patched:
        original = storage.save_tensors

        def full(tensors: dict[str, Any], path: Path) -> None:
            if "02-last" in str(path):
                raise FULL_DISK
            original(tensors, path)

        patched.setattr(storage, "save_tensors", full)
        with pytest.raises(RunError, match=r"run cannot be written, the disk is full .*; make room and go on"):
            run(recipe)
    assert read_json(tmp_path / "run" / "state.json")["finished_tasks"] == 1
    assert_same_result(run(recipe, resume=True).directory, finished)


SLOW_RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.small_run import small_recipe
from seekr_peft.training.trainer import ContinualTrainer
original = ContinualTrainer.training_step
def step(self, *args, **kwargs):
    if self.method.current_task == "third" and self.state.global_step == 3:
        print("now", flush=True)
        time.sleep(300)
    return original(self, *args, **kwargs)
ContinualTrainer.training_step = step
from seekr_peft import run_recipe
run_recipe(small_recipe(Path({directory!r})))
"""


@pytest.mark.slow
def test_a_run_killed_in_task_3_is_locked_until_then_and_resumes_bitwise(
    tmp_path: Path, finished: Path, no_report: None
) -> None:
    directory = tmp_path / "run"
    script = SLOW_RUN.format(tests=str(Path(__file__).parent), directory=str(directory))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "now\n"
            with pytest.raises(RunError, match="is in use by another process"):
                run(small_recipe(directory), resume=True)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert read_json(directory / "state.json")["finished_tasks"] == 2
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"task": "third", "task_ind')
    assert_same_result(run(small_recipe(directory), resume=True).directory, finished)


def test_a_finished_run_that_is_resumed_only_reports(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(recipe: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_module, "load_model", refuse)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (finished / "report.html").unlink()
    result = run(small_recipe(finished), resume=True)
    assert result.report.is_file()
    assert result.matrix.op() == read_json(finished / "accuracy_matrix.json")["op"]
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert {name for name in changed if not name.endswith((".png", ".html"))} == set()


def test_the_seconds_of_a_resumed_run_add_up(tmp_path: Path, no_report: None) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=2, method={"name": "sequential"})
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, measuring_module, "evaluate_task", before_evaluating_task_2)
        with pytest.raises(Killed):
            run(recipe)
    path = tmp_path / "run" / "environment.json"
    first = read_json(path)
    assert first["seconds"] > 0
    Ledger(path.parent).write_json(path.name, {**first, "seconds": 5000.0})
    run(recipe, resume=True)
    assert read_json(path)["seconds"] > 5000


def test_a_moved_run_resumes_under_its_new_path(tmp_path: Path, finished: Path, no_report: None) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    assert run(small_recipe(moved), resume=True).matrix.op() == read_json(finished / "accuracy_matrix.json")["op"]


def test_what_a_kill_left_of_the_costs_is_counted_again(tmp_path: Path, no_report: None) -> None:
    run(small_recipe(tmp_path / "run", n_tasks=2))
    whole = read_json(tmp_path / "run" / "costs.json")["tasks"]
    ledger = Ledger(tmp_path / "run")
    ledger.forget(gone := ["state.json", "accuracy_matrix.json", "costs.json"])
    for name in gone:
        (tmp_path / "run" / name).unlink()
    method = read_json(tmp_path / "run" / "method.json")
    ledger.write_json("method.json", {**method, "tasks": method["tasks"][:1], "manifests": method["manifests"][:1]})
    run(small_recipe(tmp_path / "run", n_tasks=2), resume=True)
    again = read_json(tmp_path / "run" / "costs.json")["tasks"]
    for key in ("name", "n_steps", "kept_bytes"):
        assert [cost[key] for cost in again] == [cost[key] for cost in whole], key


def test_a_run_does_not_go_on_with_another_base_or_other_data(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    assert read_json(tmp_path / "run" / "environment.json")["base"]
    with monkeypatch.context() as patch:
        patch.setattr(saved_module, "base_fingerprint", lambda model: "another")
        with pytest.raises(RunError, match="cannot go on: the base model demo changed since it began"):
            run(recipe, resume=True)
    tasks = load_tasks(load_recipe(recipe))
    other = [type(task).from_records(task.name, list(task.test), list(task.test)) for task in tasks]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_tasks", lambda recipe: [other[0], tasks[1]])
        with pytest.raises(RunError, match="cannot go on: the data of task first changed"):
            run(recipe, resume=True)
    whole = (tmp_path / "run" / "tasks.json").read_text()
    (tmp_path / "run" / "tasks.json").write_text(whole[:20])
    with pytest.raises(RunError, match=r"tasks\.json is not what was written"):
        run(recipe, resume=True)
    (tmp_path / "run" / "tasks.json").write_text(whole)
    assert run(recipe, resume=True).matrix.op() >= 0


def test_a_run_that_was_moved_goes_on_by_its_own_recipe_and_may_keep_more_checkpoints(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after_one_task(tmp_path / "old", monkeypatch)
    (tmp_path / "old").rename(tmp_path / "my new")
    path = tmp_path / "my new" / "recipe.yaml"
    more = ["training.save_strategy=steps", "training.save_steps=2"]
    result = run_recipe(path, more, resume=True, console=Console(quiet=True), report=False)
    assert result.directory == tmp_path / "my new" and not (tmp_path / "old").exists()
    with pytest.raises(RunError, match=r"training\.max_steps was 6, now 7"):
        run_recipe(path, ["training.max_steps=7"], resume=True, console=Console(quiet=True), report=False)


def test_one_bit_of_the_base_is_noticed(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(BASE_PATH, base)
    recipe = {**stopped_after_one_task(tmp_path / "run", monkeypatch), "output_dir": str(tmp_path / "other")}
    recipe["model"] = {"name_or_path": str(base), "quantization": "none"}
    evaluate = measuring_module.evaluate_task
    monkeypatch.setattr(measuring_module, "evaluate_task", None)
    with pytest.raises(TypeError):
        run(recipe)
    monkeypatch.setattr(measuring_module, "evaluate_task", evaluate)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match=r"cannot go on: the base model .* changed since it began"):
        run(recipe, resume=True)
    content[-4] ^= 1
    weights.write_bytes(content)
    assert run(recipe, resume=True).matrix.op() >= 0


def test_a_run_without_its_state_is_not_scored_anew(tmp_path: Path, no_report: None) -> None:
    run(small_recipe(tmp_path / "run", n_tasks=2))
    (tmp_path / "run" / "state.json").unlink()
    with pytest.raises(RunError, match=r"state\.json is missing"):
        run(small_recipe(tmp_path / "run", n_tasks=2), resume=True)
    Ledger(tmp_path / "run").forget(["state.json"])
    with pytest.raises(RunError, match="has 2 trained tasks of which 0 are evaluated"):
        run(small_recipe(tmp_path / "run", n_tasks=2), resume=True)


def test_finished_tasks_are_never_thrown_away(tmp_path: Path, no_report: None) -> None:
    """Without method.json nothing says which tasks were trained: state.json says that some were."""
    recipe, path = small_recipe(tmp_path / "run", n_tasks=2), tmp_path / "run" / "method.json"
    run(recipe)
    state = read_json(tmp_path / "run" / "state.json")
    ledger = Ledger(tmp_path / "run")
    ledger.write_json("state.json", {**state, "status": "running"})
    method = read_json(path)
    path.unlink()
    for resume in (True, "auto"):
        with pytest.raises(RunError, match=r"method\.json is missing; put that file back"):
            run(recipe, resume=resume)
    # As earlier versions left it, which listed no file.
    (tmp_path / "run" / "manifest.json").unlink()
    for resume in (True, "auto"):
        with pytest.raises(RunError, match=r"method\.json is missing, though 2 tasks of this run are finished"):
            run(recipe, resume=resume)
    assert len(list((tmp_path / "run" / "tasks").iterdir())) == 2
    for broken in ("{}", '{"tasks": 2}'):
        path.write_text(broken)
        with pytest.raises(RunError, match=r"method\.json is broken \(it lists no tasks\)"):
            run(recipe, resume=True)
    ledger.write_json("method.json", method)
    ledger.write_json("state.json", {**state, "status": "running", "finished_tasks": "x"})
    with pytest.raises(RunError, match=r"state\.json is broken \(finished_tasks is 'x'\)"):
        run(recipe, resume=True)


@pytest.mark.parametrize("name", ["tasks/02-last", "tasks"])
def test_a_link_where_a_task_is_to_be_written_is_refused_before_it_is_trained(
    name: str, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / name
    (tmp_path / "elsewhere").mkdir()
    if path.exists():
        path.rename(tmp_path / "kept")
        path.symlink_to(tmp_path / "kept")
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=rf"{name} is in the way \(a link or a file\)"):
        run(recipe, resume=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    path.unlink()
    if (tmp_path / "kept").exists():
        (tmp_path / "kept").rename(path)
    (tmp_path / "run" / "tasks" / "notes").symlink_to(tmp_path / "nowhere")
    assert run(recipe, resume=True).matrix.op() >= 0
    assert (tmp_path / "run" / "tasks" / "notes").is_symlink(), "what is none of the run's is left alone"


def test_lines_of_the_metrics_that_are_no_record_are_dropped(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{}\n[]\n{"task_index": 0, "st')
    assert run(recipe, resume=True).matrix.op() >= 0
    assert all("task_index" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_resume_auto_goes_on_where_there_is_something_to_go_on_with(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    first = (tmp_path / "run" / "tasks" / "01-first" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    run(recipe, resume="auto")
    again = (tmp_path / "run" / "tasks" / "01-first" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert first == again
    with pytest.raises(RunError, match=r"started with another recipe \(seed was 0, now 1\)"):
        run({**recipe, "seed": 1}, resume="auto")
    # Nothing was trained: another recipe may take its place.
    fresh = tmp_path / "fresh"
    broken = small_recipe(fresh, n_tasks=1, adapter={"target_modules": "nothing"})
    with pytest.raises(ConfigError):
        run(broken, resume="auto")
    assert run(small_recipe(fresh, n_tasks=1), resume="auto").matrix.op() >= 0


def test_what_a_run_is_compared_with_is_no_part_of_it(tmp_path: Path, no_report: None) -> None:
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    run(recipe)
    run({**recipe, "compare": {"title": "with others"}}, resume=True)
