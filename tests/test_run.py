"""A run directory: what is in it, that a kill at any moment costs at most the task in progress, and what is refused."""

from __future__ import annotations

import csv
import errno
import io
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.small_run import TASKS, read_json, read_lines, small_recipe

import seekr_peft.methods.base as base_module
import seekr_peft.run.runner as run_module
from seekr_peft import ContinualTrainer, Seekr, SeekrConfig, run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import ConfigError, DataError, RunError
from seekr_peft.files.manifest import Ledger
from seekr_peft.memory import storage
from seekr_peft.model.kind import base_fingerprint
from seekr_peft.recipe.base_model import load_model
from seekr_peft.recipe.schema import load_recipe

TERMS = ("replay_loss", "logits_loss", "attention_loss")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(recipe: dict[str, Any], **options: Any) -> Any:
    return run_recipe(recipe, console=quiet(), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks that was never stopped; tests only read it."""
    return run(small_recipe(tmp_path_factory.mktemp("run") / "seekr")).directory


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than such a training."""
    monkeypatch.setattr(run_module, "write_report", lambda directory: directory / "report.html")


# What is in it ----------------------------------------------------------------------------------------------------


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
    defaults = SeekrConfig().to_dict()
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


# Killed and resumed -----------------------------------------------------------------------------------------------


def assert_same_result(one: Path, other: Path) -> None:
    """Bitwise: adapters, importance, memories and matrix; and the same metrics."""
    files = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert len(files) == 11
    assert files == [path.relative_to(other) for path in sorted(other.rglob("*.safetensors"))]
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == [], file
    for file in ("accuracy_matrix.json", "state.json", "method.json", "tasks.json"):
        assert read_json(one / file) == read_json(other / file), file
    assert read_lines(one / "metrics.jsonl") == read_lines(other / "metrics.jsonl")
    for path in one.glob("predictions/*/*.jsonl"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def stop_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, condition: Callable[..., bool]) -> None:
    original = getattr(target, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if condition(*args, **kwargs):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, stopping)


def _in_step_5_of_task_3(trainer: Any, *args: Any, **kwargs: Any) -> bool:
    return trainer.method.current_task == "third" and trainer.state.global_step == 5


def _before_evaluating_task_2(model: Any, tokenizer: Any, task: Any, **kwargs: Any) -> bool:
    return task.name == "last"


def _before_task_3_counts_as_finished(self: Any, names: list[str], finished: int) -> bool:
    return finished == 3


def _after_task_2_is_on_disk(self: Any, directory: Path) -> bool:
    return len(self.task_names) == 2


STOPS = {
    "in the middle of training task 3": (ContinualTrainer, "training_step", _in_step_5_of_task_3),
    "between training and evaluating task 2": (run_module, "evaluate_task", _before_evaluating_task_2),
    "after the last evaluation": (run_module._Run, "_write_state", _before_task_3_counts_as_finished),
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


# Word for word what safetensors 0.8 raises on a full tmpfs.
FULL_DISK = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (FULL_DISK, True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), False),
    ],
    ids=str,
)
def test_only_a_full_disk_is_told_as_one(error: Exception, told: bool) -> None:
    with pytest.raises(RunError if told else type(error)) as caught, run_module._telling_what_failed(Path("runs/a")):
        raise error
    assert ("runs/a cannot be written, the disk is full" in str(caught.value)) == told


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
        stop_at(patched, run_module, "evaluate_task", _before_evaluating_task_2)
        with pytest.raises(Killed):
            run(recipe)
    path = tmp_path / "run" / "environment.json"
    first = read_json(path)
    assert first["seconds"] > 0
    Ledger(path.parent).write_json(path.name, {**first, "seconds": 5000.0})
    run(recipe, resume=True)
    assert read_json(path)["seconds"] > 5000


# What is refused --------------------------------------------------------------------------------------------------


def test_a_second_run_without_resume_is_refused(finished: Path) -> None:
    with pytest.raises(RunError, match="already holds a run; go on with --resume"):
        run(small_recipe(finished))


def test_resuming_with_another_recipe_names_the_key_and_both_values(finished: Path) -> None:
    with pytest.raises(RunError, match=r"another recipe \(training\.learning_rate was 0\.002, now 0\.001\)"):
        run_recipe(small_recipe(finished), ["training.learning_rate=1e-3"], resume=True, console=quiet())
    with pytest.raises(RunError, match=r"another recipe \(method\.query_budget was 100, now 9\)"):
        run_recipe(small_recipe(finished), ["method.query_budget=9"], resume=True, console=quiet())


def test_a_run_that_failed_before_its_first_task_may_be_started_again(tmp_path: Path, no_report: None) -> None:
    """Such as answers longer than the model's 128 positions, which only the loaded model tells."""
    with pytest.raises(DataError, match="the model has 128 positions"):
        run(small_recipe(tmp_path / "run", n_tasks=1, evaluation={"max_new_tokens": 200}))
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert run(small_recipe(tmp_path / "run", n_tasks=1)).matrix.op() >= 0


def test_a_run_that_was_killed_while_it_wrote_its_recipe_may_be_started_again(tmp_path: Path, no_report: None) -> None:
    (tmp_path / ".recipe.yaml.partial").write_text("model: {na")
    assert run(small_recipe(tmp_path, n_tasks=1)).matrix.op() >= 0


def test_a_folder_with_somebodys_own_recipe_and_files_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks" / "data.jsonl").write_text("mine")
    (folder / "recipe.yaml").write_text("# mine\n")
    for extra in ((), ("environment.json",)):
        for name in extra:
            (folder / name).write_text("{}")
        with pytest.raises(RunError, match="already holds a run"):
            run(small_recipe(folder))
    assert (folder / "tasks" / "data.jsonl").read_text() == "mine" and (
        folder / "recipe.yaml"
    ).read_text() == "# mine\n"


def test_a_moved_run_resumes_under_its_new_path(tmp_path: Path, finished: Path, no_report: None) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    assert run(small_recipe(moved), resume=True).matrix.op() == read_json(finished / "accuracy_matrix.json")["op"]


def test_resuming_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        run(small_recipe(tmp_path), resume=True)


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(RunError, match="is a file; choose another folder"):
        run(small_recipe(path))
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be used \(Not a directory\)"):
        run(small_recipe(path / "run"))
    assert path.read_text() == "mine"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"is not empty and holds no run \(thesis\.tex is there\)"):
        run(small_recipe(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A directory that another process has locked."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield tmp_path
        process.communicate("")


def test_a_directory_that_another_process_uses_is_refused(held: Path) -> None:
    with pytest.raises(RunError, match="is in use by another process"):
        run(small_recipe(held))
    assert [path.name for path in held.iterdir()] == [".lock"]


def test_a_broken_state_file_is_named(tmp_path: Path, finished: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"state\.json is not what was written .* seekr-peft repair .*run\.$"):
        run(small_recipe(tmp_path / "run"), resume=True)


def test_lora_settings_that_do_not_fit_the_model_are_one_sentence(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", adapter={"target_modules": ["no_such_module"]})
    with pytest.raises(ConfigError, match=r"adapter: .*no_such_module") as caught:
        run(recipe)
    assert "\n" not in str(caught.value)


def test_a_layer_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    adapter = {"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}
    message = "adapter.layers_to_transform names layer 99, but the model has 4, counted from 0; leave it out."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        run(small_recipe(tmp_path / "run", adapter=adapter))


def test_epochs_that_do_not_match_the_tasks_found_on_disk_are_refused(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks" / "only"
    tasks.mkdir(parents=True)
    for split in ("train", "test"):
        (tasks / f"{split}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    section = {"format": "jsonl", "path": str(tmp_path / "tasks"), "epochs": [1, 2]}
    with pytest.raises(ConfigError, match=r"tasks\.epochs has 2 numbers for 1 task"):
        run(small_recipe(tmp_path / "run", tasks=section))


# Variants ---------------------------------------------------------------------------------------------------------


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


# What it cost -----------------------------------------------------------------------------------------------------


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
    assert recorded == [task.fingerprint() for task in run_module.load_tasks(recipe)]
    assert recorded[0] != run_module.load_tasks(other)[0].fingerprint()


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


def stopped_after_one_task(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose second task was never begun; its recipe."""
    evaluate = run_module.evaluate_task
    recipe = small_recipe(directory, n_tasks=2)

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "evaluate_task", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.setattr(run_module, "evaluate_task", evaluate)
    return recipe


def test_a_run_does_not_go_on_with_another_base_or_other_data(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    assert read_json(tmp_path / "run" / "environment.json")["base"]
    with monkeypatch.context() as patch:
        patch.setattr(base_module, "base_fingerprint", lambda model: "another")
        with pytest.raises(RunError, match="cannot go on: the base model demo changed since it began"):
            run(recipe, resume=True)
    tasks = run_module.load_tasks(load_recipe(recipe))
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


def test_somebodys_manifest_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(RunError, match=r"is not empty and holds no run \(manifest\.json is there\)"):
        run(small_recipe(tmp_path / "run", n_tasks=1))
    assert (tmp_path / "run" / "manifest.json").read_text() == '{"name": "a web app"}'


def test_one_bit_of_the_base_is_noticed(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(BASE_PATH, base)
    recipe = {**stopped_after_one_task(tmp_path / "run", monkeypatch), "output_dir": str(tmp_path / "other")}
    recipe["model"] = {"name_or_path": str(base), "quantization": "none"}
    evaluate = run_module.evaluate_task
    monkeypatch.setattr(run_module, "evaluate_task", None)
    with pytest.raises(TypeError):
        run(recipe)
    monkeypatch.setattr(run_module, "evaluate_task", evaluate)
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


def test_what_cannot_be_written_is_named(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run_module.StepReporter.on_log

    def blocked(self: Any, *args: Any, **kwargs: Any) -> None:
        self._metrics.mkdir()
        original(self, *args, **kwargs)

    monkeypatch.setattr(run_module.StepReporter, "on_log", blocked)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read or written \(Is a directory\)"):
        run(small_recipe(tmp_path / "run", n_tasks=1))


def test_lines_of_the_metrics_that_are_no_record_are_dropped(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after_one_task(tmp_path / "run", monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{}\n[]\n{"task_index": 0, "st')
    assert run(recipe, resume=True).matrix.op() >= 0
    assert all("task_index" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"bf16": True, "fp16": True}, r": fp16 and bf16 exclude each other"),
        ({"warmup_steps": -3}, r"\.warmup_steps must be a number of at least 0"),
        ({"accelerator_config": "nowhere.json"}, r"\.accelerator_config must be a mapping, got 'nowhere\.json'"),
        ({"tf32": True}, ": --tf32 requires Ampere or a newer GPU"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
            r"\.\w+_checkpointing_kwargs: offload needs a GPU, whose memory it makes room in; leave it out\.",
        ),
    ],
)
def test_training_settings_that_exclude_each_other_are_told_before_the_model_is_loaded(
    tmp_path: Path, training: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seekr_peft.run.runner.load_model", lambda recipe: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=rf"^training{message}") as caught:
        run(small_recipe(tmp_path / "run", training=training))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "ademamix", "optim_args": "beta1=abc"}, "could not convert string to float: 'abc'"),
        (
            {
                "gradient_accumulation_steps": 2,
                "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3}},
            },
            "`num_steps` is set but `gradient_accumulation_steps` is greater than 1",
        ),
    ],
)
def test_training_settings_that_only_the_trainer_checks_are_one_sentence(
    tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^training: .*{message}") as caught:
        run(small_recipe(tmp_path / "run", training=training))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["torch._dynamo.exc", "builtins"])
def test_a_compiler_that_is_missing_is_one_sentence_and_a_bug_keeps_its_traceback(
    module: str, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = type("BackendCompilerFailed", (RuntimeError,), {"__module__": module})

    def fail(trainer: Any, *args: Any, **kwargs: Any) -> None:
        raise failure("backend='tvm' raised:\nImportError: please install it " + "x" * 9000)

    monkeypatch.setattr("seekr_peft.run.runner.ContinualTrainer.train", fail)
    expected = ConfigError if module.startswith("torch") else failure
    with pytest.raises(expected, match="backend='tvm' raised:") as caught:
        run(small_recipe(tmp_path / "run", n_tasks=1))
    if expected is ConfigError:
        assert str(caught.value).startswith("training: ") and len(str(caught.value)) < 520
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [None, {}, {"determinism_check": "none"}])
def test_checkpointing_is_never_reentrant_because_nothing_is_said(
    options: dict[str, Any] | None, tmp_path: Path, no_report: None
) -> None:
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options, "max_steps": 1}
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    recipe["training"] |= training
    assert run(recipe).matrix.op() >= 0


def test_half_precision_that_a_cpu_does_not_have_is_told(tmp_path: Path, no_report: None) -> None:
    file = io.StringIO()
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    recipe["training"] |= {"fp16": True}
    run_recipe(recipe, console=Console(file=file, width=200))
    assert "training.fp16 has no effect without a GPU" in file.getvalue()


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
