"""The demo: three methods with the same steps, one page, and nobody's folder is overwritten."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.small_run import TASKS, read_json, read_lines, small_recipe

import seekr_peft.demo.run as demo_module
from seekr_peft.demo.run import METHODS, demo_recipe, run_demo
from seekr_peft.errors import RunError
from seekr_peft.evaluation import AccuracyMatrix
from seekr_peft.recipe import load_recipe


def run_of(folder: Path, method: str) -> Path:
    """The directory of a method's run."""
    return folder / "runs" / method / "order1-seed0"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a demo of a few steps, and what it printed; tests only read it."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    console = Console(file=io.StringIO(), width=160)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo_module, "demo_recipe", lambda: small_recipe(folder))
        page = run_demo(folder, console)
    assert page.is_file() and page.parent == folder
    return folder, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_three_methods_take_the_same_steps_on_the_same_recipe(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    steps, recipes = [], []
    for method in METHODS:
        run = run_of(folder, method)
        lines = read_lines(run / "metrics.jsonl")
        steps.append([(line["task"], line["step"]) for line in lines])
        recipes.append(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
        assert recipes[-1]["method"].pop("name") == method
        assert recipes[-1].pop("output_dir") == str(run)
        assert read_json(run / "state.json")["status"] == "finished"
    assert steps[0] == steps[1] == steps[2] == [(name, step) for name in TASKS for step in (4, 6)]
    assert recipes[0] == recipes[1] == recipes[2]


@pytest.mark.slow
def test_the_first_task_is_the_same_whatever_the_method(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    adapters = [
        (run_of(folder, method) / "tasks/01-first/adapter/adapter_model.safetensors").read_bytes() for method in METHODS
    ]
    assert adapters[0] == adapters[1] == adapters[2]


@pytest.mark.slow
def test_the_page_and_the_table_show_the_three_methods(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    pages = list(folder.glob("*.html"))
    assert len(pages) == 1
    text = pages[0].read_text(encoding="utf-8")
    assert all(method in text for method in METHODS)
    assert str(pages[0]) in printed
    for method in METHODS:
        matrix = read_json(run_of(folder, method) / "accuracy_matrix.json")
        line = next(line for line in printed.splitlines() if line.startswith("│") and f" {method} " in line)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        expected = [f"{100 * row[-1]:.1f}" for row in matrix["scores"]]
        assert cells == [method, *expected, f"{100 * matrix['op']:.1f}", f"{100 * matrix['bwt']:+.1f}"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_itself_learns_every_task_and_seekr_keeps_them(tmp_path: Path) -> None:
    """The recipe that users get; the README has figures over several seeds, one seed is noisy: hence the slack."""
    run_demo(tmp_path / "demo", Console(file=io.StringIO(), width=160))
    matrices = {method: AccuracyMatrix.load(run_of(tmp_path / "demo", method)) for method in METHODS}
    for method, matrix in matrices.items():
        learnt = {name: matrix.score(after=name, on=name) for name in matrix.task_names}
        assert min(score or 0 for score in learnt.values()) >= 0.95, (method, learnt)
    operating = {method: matrix.op() for method, matrix in matrices.items()}
    # Another kind of CPU rounds differently, which is as good as another seed: over four of them sequential training
    # ended at 0.24 to 0.48, over seven SEEKR at 0.64 to 0.99 (six of them above 0.87) and never below replay.
    assert operating["sequential"] < 0.6 and operating["seekr"] > max(0.6, operating["sequential"] + 0.1), operating
    assert operating["seekr"] > operating["replay"] - 0.1, operating


class Stopped(Exception):
    """Raised where the first run would begin."""


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the runs; returns the recipes that would have run."""
    recipes: list[dict[str, Any]] = []

    def stop(recipe: dict[str, Any], **options: Any) -> None:
        recipes.append(recipe)
        raise Stopped

    monkeypatch.setattr(demo_module, "compare", stop)
    return recipes


def test_an_earlier_demo_is_replaced(tmp_path: Path, nothing_runs: list[dict[str, Any]]) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):
        with pytest.raises(Stopped):
            run_demo(folder, Console(file=io.StringIO()))
        assert not (folder / "old").exists()
        (folder / "old").mkdir()
    assert [recipe["output_dir"] for recipe in nothing_runs] == [str(folder)] * 2


def test_a_foreign_folder_or_file_is_refused_and_left_alone(tmp_path: Path, nothing_runs: list[dict[str, Any]]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    for path in (folder, folder / "thesis.tex"):
        with pytest.raises(RunError, match="is not empty and holds no earlier demo; choose another folder with --out"):
            run_demo(path, Console(file=io.StringIO()))
    assert (folder / "thesis.tex").read_text() == "mine"
    assert nothing_runs == []


def test_the_demos_recipe_has_no_mistake_and_no_network() -> None:
    recipe = load_recipe(demo_recipe())
    assert (recipe.model.name_or_path, recipe.tasks.format) == ("demo", "demo")
    assert recipe.model.quantization == "nf4"
