"""A run directory: what is in it, and what a run costs."""

from __future__ import annotations

import csv
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.runs import (
    quiet,
    run,
)
from support.small_run import TASKS, read_json, read_lines, small_recipe

import seekr_peft.run.runner as run_module
from seekr_peft import run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.methods.registry import OWN_CONFIGS
from seekr_peft.model.kind import base_fingerprint
from seekr_peft.recipe import load_recipe
from seekr_peft.recipe.base_model import load_model
from seekr_peft.run.task_data import load_tasks

TERMS = ("replay_loss", "logits_loss", "attention_loss")


def test_the_directory_holds_every_file_of_its_format(finished: Path) -> None:
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    folders = [f"{number:02d}-{name}" for number, name in enumerate(TASKS, start=1)]
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    expected = {"recipe.yaml", "environment.json", "state.json", "metrics.jsonl", "importance.safetensors"}
    expected |= {
        "costs.json",
        "accuracy_matrix.json",
        "accuracy_matrix.csv",
        "report.html",
        "method.json",
        "tasks.json",
        "manifest.json",
        ".lock",
    }
    expected |= {f"adapter/{name}" for name in adapter}
    expected |= {f"tasks/{folder}/adapter/{name}" for folder in folders for name in adapter}
    expected |= {f"tasks/{folder}/memory.{ending}" for folder in folders for ending in ("json", "safetensors")}
    expected |= {f"tasks/{folder}/{name}" for folder in folders for name in ("manifest.json", "importance.safetensors")}
    expected |= {
        f"predictions/{after}/{on}.jsonl" for place, after in enumerate(folders) for on in folders[: place + 1]
    }
    figures = {name for name in files if name.startswith("figures/")}
    assert files - figures == expected
    assert len(figures) >= 3 and all(name.endswith(".png") for name in figures)


def test_the_recipe_is_stored_resolved(finished: Path) -> None:
    stored = yaml.safe_load((finished / "recipe.yaml").read_text(encoding="utf-8"))
    assert stored["tasks"]["max_length"] == 512
    given = small_recipe(finished)
    defaults = {key: value for kind in OWN_CONFIGS.values() for key, value in kind().to_dict().items()}
    assert set(stored["method"]) == {"name", *defaults} - {"seed"}, "the seed is the recipe's"
    assert stored["method"] == {key: given["method"].get(key, defaults.get(key)) for key in stored["method"]}
    assert stored["adapter"] == {
        "mode": "stack",
        "rank_limit": "auto",
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **given["adapter"],
    }
    assert load_recipe(finished / "recipe.yaml").to_dict() == stored


def test_state_and_environment_tell_how_far_it_came(finished: Path) -> None:
    assert read_json(finished / "state.json") == {
        "finished_tasks": 3,
        "tasks": TASKS,
        "last_finished": "third",
        "status": "finished",
    }
    environment = read_json(finished / "environment.json")
    assert set(environment) == {"versions", "machine", "command", "base", "seconds"}
    assert environment["versions"]["torch"] == version("torch")
    assert 0 < environment["seconds"] < 600


def test_a_memory_names_its_samples_teacher_and_heads(finished: Path) -> None:
    for number, name in enumerate(TASKS, start=1):
        folder = finished / "tasks" / f"{number:02d}-{name}"
        header = read_json(folder / "memory.json")
        assert (header["format"], header["task"], header["n_samples"]) == (3, name, 4)
        assert header["bytes"] == (folder / "memory.safetensors").stat().st_size
        assert header["bytes"] <= header["estimated_bytes"] < 1.5 * header["bytes"]
        assert header["teacher"]["loss"] > 0 and header["teacher"]["answer_entropy"] > 0
        # Three quarters of 4 layers, an eighth of 32 heads.
        assert sum(map(len, header["selection"].values())) == 4
        assert (header["row_top_k"], header["logit_top_k"], header["kept_mass"]) == (32, 1024, 0.995)
        # A cue, seven words, "=", beginning, answer and end.
        assert header["queries_per_sample"] == len(load_file(folder / "memory.safetensors")["input_ids"]) // 4


def test_the_importance_file_has_each_tasks_scores_and_heads(finished: Path) -> None:
    tensors = load_file(finished / "importance.safetensors")
    folders = [f"{number:02d}-{name}" for number, name in enumerate(TASKS, start=1)]
    assert set(tensors) == {"forgettability", "sensitivity", "importance"} | {
        f"{kind}.{folder}" for kind in ("forgettability", "sensitivity", "selected") for folder in folders
    }
    assert all(tensor.shape == (4, 8) for tensor in tensors.values())
    for kind in ("forgettability", "sensitivity"):
        total = sum(tensors[f"{kind}.{folder}"].double() for folder in folders)
        torch.testing.assert_close(tensors[kind].double(), total, atol=1e-6, rtol=1e-5)
    for folder in folders:
        assert tensors[f"selected.{folder}"].dtype == torch.bool
        selection = read_json(finished / "tasks" / folder / "memory.json")["selection"]
        found = {(int(layer), head) for layer, heads in selection.items() for head in heads}
        assert {tuple(place) for place in tensors[f"selected.{folder}"].nonzero().tolist()} == found


def test_the_metrics_have_the_loss_terms_apart_and_the_last_step_of_each_task(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [(line["task"], line["task_index"], line["step"]) for line in lines] == [
        (name, index, step) for index, name in enumerate(TASKS) for step in (4, 6)
    ]
    for line in lines:
        assert {"loss", "epoch", "learning_rate", "grad_norm"} < set(line)
        assert [name in line for name in TERMS] == [line["task_index"] > 0] * 3
        assert all(line[name] > 0 for name in TERMS if name in line)


def test_a_matrix_entry_is_the_mean_score_of_its_predictions(finished: Path) -> None:
    matrix = read_json(finished / "accuracy_matrix.json")
    assert matrix["tasks"] == TASKS
    for after, after_name in enumerate(TASKS):
        for on, on_name in enumerate(TASKS):
            entry = matrix["scores"][on][after]
            if on > after:
                assert entry is None
                continue
            path = finished / "predictions" / f"{after + 1:02d}-{after_name}" / f"{on + 1:02d}-{on_name}.jsonl"
            lines = read_lines(path)
            assert len(lines) == 8 and set(lines[0]) == {"prompt", "answer", "prediction", "score"}
            assert [line["score"] for line in lines] == [float(line["prediction"] == line["answer"]) for line in lines]
            assert entry == pytest.approx(sum(line["score"] for line in lines) / 8)
    scores = matrix["scores"]
    assert matrix["op"] == pytest.approx(sum(scores[i][2] for i in range(3)) / 3)
    assert matrix["bwt"] == pytest.approx(sum(scores[i][2] - scores[i][i] for i in range(2)) / 2)
    assert set(matrix["formulas"]) >= {"op", "bwt"}
    with (finished / "accuracy_matrix.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) >= 4


def test_the_console_tells_each_tasks_steps_terms_and_scores(tmp_path: Path, no_report: None) -> None:
    console = quiet()
    run_recipe(small_recipe(tmp_path / "run", n_tasks=2), console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "trained 1/2 first: 6 steps, new " in text
    assert "kept 4 samples" in text and "nats a token" in text
    second = next(line for line in text.splitlines() if line.startswith("trained 2/2 last: 6 steps"))
    assert all(f"{label} " in second for label in ("new", "replay", "logits", "attention"))
    assert "  after last: first " in text
    assert "OP = 1/K" in text and "BWT = 1/(K-1)" in text


def test_epochs_checkpointing_and_nf4_train_one_task(tmp_path: Path, no_report: None) -> None:
    recipe = small_recipe(
        tmp_path / "run",
        n_tasks=1,
        model={"name_or_path": "demo", "quantization": "nf4"},
        training={"gradient_checkpointing": True, "per_device_train_batch_size": 8},
    )
    recipe["tasks"]["epochs"] = [0.4]
    result = run(recipe)
    assert [line["step"] for line in read_lines(result.directory / "metrics.jsonl")] == [2]
    assert result.matrix.bwt() == 0


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "seekr_peft":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, out, *runs = sys.argv[1:]
logits = {}
for run in runs:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run + "/adapter").eval()
    with torch.no_grad():
        logits[run] = model(input_ids=torch.arange(4, 40).reshape(3, 12)).logits.contiguous()
assert "seekr_peft" not in sys.modules
save_file(logits, out)
"""


@pytest.mark.slow
def test_the_final_adapter_needs_nothing_of_this_package(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    original = run_module.load_model
    monkeypatch.setattr(run_module, "load_model", lambda recipe: _remembered(original(recipe), models))
    expected: dict[str, torch.Tensor] = {}
    for method in ("seekr", "sequential"):
        for mode in ("stack", "continue"):
            recipe = small_recipe(tmp_path / f"{method}-{mode}", n_tasks=2)
            recipe["method"] = {**recipe["method"], "name": method}
            recipe["adapter"] = {"r": 4, "lora_alpha": 8, "mode": mode}
            directory = run(recipe).directory
            model = models.pop().eval()
            with torch.no_grad():
                expected[str(directory)] = model(input_ids=torch.arange(4, 40).reshape(3, 12)).logits
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), str(BASE_PATH), str(tmp_path / "logits"), *expected],
        check=True,
        timeout=200,
        capture_output=True,
    )
    found = load_file(tmp_path / "logits")
    assert found.keys() == expected.keys() and len(found) == 4
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-5, rtol=1e-5)
    all_logits = list(found.values())
    assert all(float((all_logits[0] - other).abs().max()) > 0.01 for other in all_logits[1:])


def _remembered(loaded: tuple[Any, Any], into: list[Any]) -> tuple[Any, Any]:
    into.append(loaded[0])
    return loaded


def test_the_costs_of_each_task_are_recorded(finished: Path) -> None:
    costs = read_json(finished / "costs.json")["tasks"]
    assert [cost["name"] for cost in costs] == TASKS
    assert [cost["n_steps"] for cost in costs] == [6, 6, 6]
    for cost, folder in zip(costs, sorted((finished / "tasks").iterdir()), strict=True):
        kept = sum(path.stat().st_size for path in folder.glob("memory.*"))
        assert cost["kept_bytes"] == kept > 0
        assert cost["train_seconds"] > 0 and cost["other_seconds"] > 0 and cost["evaluate_seconds"] > 0
    # A step with a replay batch, measured where there is one to replay.
    first, second, _ = (cost["step_peak_bytes"] for cost in costs)
    assert 0.9 * first < second < 20 * first


def test_runs_of_the_same_base_and_data_have_the_same_fingerprints(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    other = load_recipe({**recipe.to_dict(), "seed": 1})
    base = read_json(finished / "environment.json")["base"]
    assert base == base_fingerprint(load_model(recipe)[0]) == base_fingerprint(load_model(other)[0])
    moved, _ = load_model(recipe)
    with torch.no_grad():
        next(p for name, p in moved.named_parameters() if "lora_" not in name).add_(1e-3)
    assert base_fingerprint(moved) != base
    recorded = [fact["fingerprint"] for fact in read_json(finished / "tasks.json")]
    assert recorded == [task.fingerprint() for task in load_tasks(recipe)]
    assert recorded[0] != load_tasks(other)[0].fingerprint()


@pytest.mark.parametrize("options", [None, {}, {"determinism_check": "none"}])
def test_checkpointing_is_never_reentrant_because_nothing_is_said(
    options: dict[str, Any] | None, tmp_path: Path, no_report: None
) -> None:
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options, "max_steps": 1}
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    recipe["training"] |= training
    assert run(recipe).matrix.op() >= 0
