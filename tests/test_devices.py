"""One process, one GPU: anything more is refused in a sentence before there is anything to lose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import command
from support.small_run import small_recipe
from support.trainers import NEW, adapted, arguments

from seekr_peft import ContinualTrainer, Sequential
from seekr_peft.compare import compare
from seekr_peft.errors import ConfigError

SEVERAL = r"2 processes were started, and training in several is not supported: .* torchrun"
GPUS = r"2 GPUs are visible, .* nn\.DataParallel.*; set CUDA_VISIBLE_DEVICES=0"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_task_in_one_of_two_processes_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    method = Sequential(adapted(), directory=tmp_path / "method")
    with pytest.raises(ConfigError, match=SEVERAL), method.task("first"):
        pass
    monkeypatch.setenv(name, "1")
    with method.task("first"):
        pass


def test_a_run_under_a_launcher_is_refused_before_its_folder_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path / "run")))
    assert command("run", str(tmp_path / "recipe.yaml"), monkeypatch=monkeypatch) == 2
    assert "2 processes were started" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["run", "compare"])
def test_two_visible_gpus_are_refused_before_anything_is_loaded(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seekr_peft import run_recipe

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = small_recipe(tmp_path / "run")
    with pytest.raises(ConfigError, match=GPUS):
        run_recipe(recipe) if what == "run" else compare(recipe)
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_would_spread_batches_over_two_gpus_is_refused(tmp_path: Path) -> None:
    method = Sequential(adapted(), directory=tmp_path / "method")
    args = arguments(tmp_path / "out")
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with method.task("first"), pytest.raises(ConfigError, match=GPUS):
        ContinualTrainer(model=method.model, method=method, args=args, train_dataset=NEW)


SCRIPT = """
import sys
from seekr_peft import cli
sys.argv = ["seekr-peft", "run", sys.argv[1]]
cli.main()
"""


def test_torchrun_with_two_ranks_ends_with_the_sentence_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path / "run")))
    (tmp_path / "start.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, str(tmp_path / "start.py"), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "2 processes were started" in result.stderr
    assert "in use by another process" not in result.stderr
    assert not (tmp_path / "run").exists()
