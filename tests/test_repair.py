"""Going on from the last undamaged task: to the same end, and nothing that is whole is lost."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console
from support.damages import DAMAGES, damaged_names, flip
from support.runs import assert_same_result
from support.small_run import TASKS, read_json, small_recipe
from support.tiny_models import tiny_llama

from seekr_peft import Seekr, SeekrConfig, run_recipe
from seekr_peft.errors import RunError, RunInUseError
from seekr_peft.run.repair import repair, verify


def make(directory: Path, **changes: Any) -> Path:
    run_recipe(small_recipe(directory, **changes), console=Console(quiet=True), report=False)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def contents(directory: Path) -> Counter[str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in (".lock", "manifest.json"))
    return Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


KEPT = {
    "tasks/02-last": ["first"],
    "tasks/01-first": [],
    "tasks/03-third": ["first", "last"],
}
"""The tasks that are kept where a file of this folder is damaged; all where it is another file."""


def kept_after(name: str) -> list[str]:
    return next((kept for folder, kept in KEPT.items() if name.startswith(folder)), TASKS)


@pytest.mark.parametrize("damage", ["a flipped bit", "gone", "a folder"])
@pytest.mark.parametrize("name", damaged_names())
def test_nothing_whole_is_lost_and_the_right_tasks_are_kept(name: str, damage: str, run: Path) -> None:
    before = contents(run)
    lost = Counter([hashlib.sha256((run / name).read_bytes()).hexdigest()])
    DAMAGES[damage](run / name)
    done = repair(run)
    assert str(done.damages[0].path) == str(run / name)
    assert done.kept == kept_after(name)
    assert before - contents(run) - lost == Counter(), "whole files are there, under damaged-1 or in their place"
    assert done.aside == run / "damaged-1"
    if done.kept or (run / "manifest.json").exists():
        assert list(repair(run).damages) == []
    assert not (run / "damaged-2").exists()


@pytest.mark.parametrize(
    "name",
    ["tasks/02-last/memory.safetensors", "tasks/01-first/adapter/adapter_model.safetensors", "importance.safetensors",
     "adapter/adapter_model.safetensors", "accuracy_matrix.json", "method.json", "state.json", "recipe.yaml",
     "tasks.json", "environment.json", "manifest.json", "predictions/02-last/01-first.jsonl", "costs.json"],
)  # fmt: skip
def test_a_repaired_run_goes_on_to_the_same_end(name: str, whole: Path, run: Path) -> None:
    flip(run / name)
    repair(run)
    run_recipe(small_recipe(run), resume=True, console=Console(quiet=True), report=False)
    aside = run / "damaged-1"
    shutil.rmtree(aside)
    if name.startswith("predictions"):
        shutil.copytree(whole / "predictions", run / "predictions", dirs_exist_ok=True)
    assert_same_result(run, whole)
    if not name.startswith("predictions"):
        assert "are what was written" in verify(run)


def test_lost_metrics_cost_the_curves_alone(whole: Path, run: Path) -> None:
    flip(run / "metrics.jsonl")
    repair(run)
    run_recipe(small_recipe(run), resume=True, console=Console(quiet=True))
    assert read_json(run / "accuracy_matrix.json") == read_json(whole / "accuracy_matrix.json")


def test_two_damages_at_once_take_the_earlier_task(whole: Path, run: Path) -> None:
    flip(run / "tasks" / "03-third" / "memory.json")
    flip(run / "accuracy_matrix.json")
    flip(run / "predictions" / "02-last" / "02-last.jsonl")
    done = repair(run)
    assert done.kept == ["first", "last"] and len(done.damages) == 3
    run_recipe(small_recipe(run), resume=True, console=Console(quiet=True), report=False)
    shutil.rmtree(run / "damaged-1")
    assert_same_result(run, whole)


def test_a_repair_that_was_killed_is_done_again(run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import seekr_peft.run.repair as module

    class Killed(BaseException):
        pass

    move = module._Aside.move
    for n_moves in range(5):
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        flip(run / "tasks" / "02-last" / "memory.safetensors")
        count = iter(range(100))

        def moving(self: Any, path: Path, count: Any = count, last: int = n_moves) -> None:
            if next(count) >= last:
                raise Killed
            move(self, path)

        with monkeypatch.context() as patched:
            patched.setattr(module._Aside, "move", moving)
            with pytest.raises(Killed):
                repair(run)
        repair(run)
        assert read_json(run / "method.json")["tasks"] == ["first"], n_moves
        assert list(repair(run).damages) == []
    run_recipe(small_recipe(run), resume=True, console=Console(quiet=True), report=False)
    for folder in run.glob("damaged-*"):
        shutil.rmtree(folder)
    assert_same_result(run, whole)


def test_tasks_that_are_trained_at_once_are_repaired(tmp_path: Path) -> None:
    changes = {"method": {"name": "multitask"}, "n_tasks": 2}
    run = make(tmp_path / "run", **changes)
    matrix = read_json(run / "accuracy_matrix.json")
    flip(run / "accuracy_matrix.json")
    assert repair(run).kept == ["all_tasks"]
    run_recipe(small_recipe(run, **changes), resume=True, console=Console(quiet=True), report=False)
    assert read_json(run / "accuracy_matrix.json") == matrix
    flip(run / "tasks" / "01-all_tasks" / "adapter" / "adapter_model.safetensors")
    assert repair(run).kept == []
    run_recipe(small_recipe(run, **changes), resume=True, console=Console(quiet=True), report=False)
    assert read_json(run / "accuracy_matrix.json") == matrix


def test_what_save_pretrained_wrote_is_repaired_too(tmp_path: Path) -> None:
    from support.checkpoints import FIRST, SECOND, arguments, trainer

    def fresh() -> Any:
        return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    method = Seekr(fresh(), SeekrConfig(replay_ratio=0.25, layer_budget=2, head_budget=5))
    for name, data in (("a", FIRST), ("b", SECOND)):
        with method.task(name, data):
            trainer(method, arguments(tmp_path / name, save_strategy="no", max_steps=3), data).train()
    method.save_pretrained(tmp_path / "out")
    assert "are what was written" in verify(tmp_path / "out")
    flip(tmp_path / "out" / "tasks" / "02-b" / "memory.safetensors")
    with pytest.raises(RunError, match=r"02-b/memory\.safetensors is not what was written .* seekr-peft repair"):
        Seekr.from_pretrained(fresh(), tmp_path / "out")
    done = repair(tmp_path / "out")
    assert list(done.sentences(tmp_path / "out"))[-1].startswith("it goes on after task a: from_pretrained(model, ")
    again = Seekr.from_pretrained(fresh(), tmp_path / "out")
    assert again.task_names == ["a"] and len(again.memory.tasks) == 1
    with again.task("b", SECOND):
        trainer(again, arguments(tmp_path / "again", save_strategy="no", max_steps=3), SECOND).train()
    again.save_pretrained(tmp_path / "out")
    assert "are what was written" in verify(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "damaged-1")
    assert "are what was written" in verify(tmp_path / "out")


def test_a_whole_run_is_left_as_it_is(run: Path) -> None:
    before = contents(run)
    done = repair(run)
    assert done.aside is None and contents(run) == before
    assert list(done.sentences(run)) == [f"{run} is whole; nothing was changed."]


def test_what_cannot_be_repaired_is_refused(tmp_path: Path, run: Path) -> None:
    from filelock import FileLock

    with pytest.raises(RunError, match="is no folder"):
        repair(tmp_path / "nowhere")
    with FileLock(run / ".lock"), pytest.raises(RunInUseError, match="in use by another process"):
        repair(run)


def test_another_recipe_is_refused_where_the_stored_one_was_lost(run: Path) -> None:
    flip(run / "recipe.yaml")
    flip(run / "tasks" / "03-third" / "memory.json")
    repair(run)
    changed = small_recipe(run, training={"max_steps": 7})
    with pytest.raises(RunError, match=r"started with another recipe \(task 01-first, by its manifest"):
        run_recipe(changed, resume=True, console=Console(quiet=True), report=False)


# Several damages, whole folders, what is in the way -----------------------------------------------------------------


def go_on(run: Path, **changes: Any) -> None:
    run_recipe(small_recipe(run, **changes), resume=True, console=Console(quiet=True), report=False)


def test_the_answers_of_tasks_trained_at_once_are_kept(tmp_path: Path) -> None:
    changes = {"method": {"name": "multitask"}, "n_tasks": 2}
    run = make(tmp_path / "run", **changes)
    answers = {path.relative_to(run): path.read_bytes() for path in run.glob("predictions/*/*")}
    flip(run / "adapter" / "adapter_model.safetensors")
    assert repair(run).kept == ["all_tasks"]
    go_on(run, **changes)
    assert {path.relative_to(run): path.read_bytes() for path in run.glob("predictions/*/*")} == answers


@pytest.mark.parametrize("name", ["tasks.json", "state.json", "costs.json", "accuracy_matrix.json", "recipe.yaml"])
def test_what_cannot_be_read_is_damaged_though_the_list_was_lost(name: str, whole: Path, run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / name).write_bytes(b"{")
    assert run / name in {damage.path for damage in repair(run).damages}
    go_on(run)
    assert_same_result_but_for_the_repair(run, whole)


def assert_same_result_but_for_the_repair(run: Path, whole: Path) -> None:
    for aside in run.glob("damaged-*"):
        shutil.rmtree(aside)
    assert_same_result(run, whole)


def test_a_run_that_has_nothing_left_begins_anew_with_resume(whole: Path, run: Path) -> None:
    flip(run / "recipe.yaml")
    flip(run / "tasks" / "01-first" / "memory.json")
    assert repair(run).kept == []
    go_on(run)
    assert_same_result_but_for_the_repair(run, whole)


def test_a_folder_of_another_name_is_no_task(whole: Path, run: Path) -> None:
    (run / "tasks" / "01-first").rename(run / "tasks" / "01-first-old")
    assert repair(run).kept == []
    go_on(run)
    assert_same_result_but_for_the_repair(run, whole)


@pytest.mark.parametrize("what", ["a link to nowhere", "a loop", "a file"])
@pytest.mark.parametrize("name", ["tasks", "predictions", "predictions/02-last", "tasks/02-last", "adapter"])
def test_what_is_in_the_place_of_a_folder_is_put_aside(name: str, what: str, run: Path) -> None:
    path = run / name
    shutil.rmtree(path)
    if what == "a file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere" if what == "a link to nowhere" else path)
    done = repair(run)
    assert done.aside is not None and (done.aside / name).is_symlink() == (what != "a file")
    assert not path.is_symlink() and not path.is_file()
    go_on(run)
    assert read_json(run / "state.json")["status"] == "finished"


@pytest.mark.parametrize("name", ["predictions/02-last", "predictions/03-third/01-first.jsonl", "tasks/01-first"])
def test_a_report_names_what_is_gone(name: str, run: Path) -> None:
    from seekr_peft.report import write_report

    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RunError, match=name):
        write_report(run)


def test_a_checkpoint_that_was_being_removed_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is gone before its files are."""
    import seekr_peft.files.atomic as files_module

    removed: list[Path] = []
    remove = shutil.rmtree

    class Killed(BaseException):
        pass

    def killed(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).name.startswith(".checkpoint") and Path(path).exists():
            removed.append(Path(path))
            next(iter(Path(path).iterdir())).unlink() if not (Path(path) / "adapter").is_dir() else None
            raise Killed
        remove(path, *args, **options)

    training = {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 4,
                "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(files_module.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            make(tmp_path / "run", training=training)
    assert removed
    assert list(repair(tmp_path / "run").damages) == []
    go_on(tmp_path / "run", training=training)
