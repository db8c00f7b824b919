"""What a run refuses, in a sentence: folders of others, settings that do not fit, a disk that is full."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError
from support.runs import (
    FULL_DISK,
    quiet,
    run,
)
from support.small_run import small_recipe

from seekr_peft import run_recipe
from seekr_peft.errors import ConfigError, DataError, RunError
from seekr_peft.run.directory import telling_what_failed
from seekr_peft.run.progress import StepReporter


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
    with pytest.raises(RunError if told else type(error)) as caught, telling_what_failed(Path("runs/a")):
        raise error
    assert ("runs/a cannot be written, the disk is full" in str(caught.value)) == told


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


def test_somebodys_manifest_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(RunError, match=r"is not empty and holds no run \(manifest\.json is there\)"):
        run(small_recipe(tmp_path / "run", n_tasks=1))
    assert (tmp_path / "run" / "manifest.json").read_text() == '{"name": "a web app"}'


def test_what_cannot_be_written_is_named(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StepReporter.on_log

    def blocked(self: Any, *args: Any, **kwargs: Any) -> None:
        self._metrics.mkdir()
        original(self, *args, **kwargs)

    monkeypatch.setattr(StepReporter, "on_log", blocked)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read or written \(Is a directory\)"):
        run(small_recipe(tmp_path / "run", n_tasks=1))


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

    monkeypatch.setattr("seekr_peft.training.trainer.ContinualTrainer.train", fail)
    expected = ConfigError if module.startswith("torch") else failure
    with pytest.raises(expected, match="backend='tvm' raised:") as caught:
        run(small_recipe(tmp_path / "run", n_tasks=1))
    if expected is ConfigError:
        assert str(caught.value).startswith("training: ") and len(str(caught.value)) < 520
        assert "\n" not in str(caught.value)


def test_half_precision_that_a_cpu_does_not_have_is_told(tmp_path: Path, no_report: None) -> None:
    file = io.StringIO()
    recipe = small_recipe(tmp_path / "run", n_tasks=1)
    recipe["training"] |= {"fp16": True}
    run_recipe(recipe, console=Console(file=file, width=200))
    assert "training.fp16 has no effect without a GPU" in file.getvalue()
