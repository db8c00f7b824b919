"""The command line: quick help, one line per mistake, and each command as its one call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import command
from support.run_directory_fixture import build_run

import seekr_peft

GOOD = {"model": {"name_or_path": "demo"}, "tasks": {"format": "demo"}}
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "accelerate", "bitsandbytes")


def modules_after(code: str) -> set[str]:
    """Heavy modules that are loaded once a fresh process has run ``code``."""
    script = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``call("run", path)`` -> (status, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = command(*arguments, monkeypatch=monkeypatch)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


# What is loaded ---------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_after("import seekr_peft; dir(seekr_peft)") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['seekr-peft', *{arguments!r}]\n"
        "from seekr_peft.cli import main\ntry: main()\nexcept SystemExit as exited: assert not exited.code"
    )
    assert modules_after(code) == set()


def test_every_public_name_can_be_imported_from_the_package() -> None:
    pytest.importorskip("trl")
    assert all(getattr(seekr_peft, name) is not None for name in seekr_peft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Seeker'"):
        _ = seekr_peft.Seeker  # type: ignore[attr-defined]


# Commands ---------------------------------------------------------------------------------------------------------


def test_version_is_the_packages(call: Any) -> None:
    assert call("--version") == (0, f"seekr-peft {seekr_peft.__version__}\n", "")


def test_help_lists_the_commands(call: Any) -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert all(name in out for name in ("demo", "run", "report", "inspect", "export"))


def test_check_reads_the_recipe_with_its_overrides_and_runs_nothing(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "output_dir": str(tmp_path / "run")}))
    assert call("run", path, "--check") == (0, f"{path} is fine.\n", "")
    status, out, err = call("run", path, "seed=-1", "--check")
    assert (status, out) == (2, "")
    assert err == "seekr-peft: seed must be at least 0, got -1.\n"
    assert not (tmp_path / "run").exists()


def test_run_hands_recipe_overrides_and_resume_on(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import seekr_peft.run.runner

    calls: list[Any] = []
    monkeypatch.setattr(seekr_peft.run.runner, "run_recipe", lambda *a, **k: calls.append((a, k)))
    assert call("run", "r.yaml", "seed=1", "tasks.max_train=5", "--resume")[0] == 0
    assert call("run", "r.yaml")[0] == 0
    assert calls == [
        ((Path("r.yaml"), ["seed=1", "tasks.max_train=5"]), {"resume": True}),
        ((Path("r.yaml"), []), {"resume": False}),
    ]


@pytest.mark.parametrize("verb", ["run", "doctor"])
@pytest.mark.parametrize("family", ["roberta", "bart", "deberta-v2"])
def test_another_kind_of_model_is_one_line_and_status_2(call: Any, tmp_path: Path, verb: str, family: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    recipe = {**GOOD, "model": {"name_or_path": str(tmp_path / "base")}, "output_dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump({**recipe, "method": {"name": "sequential"}}))
    status, _, err = call(verb, path)
    reason = "is an encoder-decoder" if family == "bart" else "looks in both directions"
    assert status == 2 and err.splitlines()[-1].startswith(
        f"seekr-peft: model.name_or_path: {tmp_path / 'base'} (model_type {family}) {reason}"
    )
    assert "Traceback" not in err


def test_demo_hands_its_folder_on(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import seekr_peft.demo.run

    calls: list[Path] = []
    monkeypatch.setattr(seekr_peft.demo.run, "run_demo", calls.append)
    assert call("demo")[0] == call("demo", "--out", "there")[0] == 0
    assert calls == [Path("runs/demo"), Path("there")]


def test_report_writes_the_page_and_prints_where(call: Any, tmp_path: Path) -> None:
    directory = build_run(tmp_path / "run")
    status, out, _ = call("report", directory)
    assert (status, out.strip()) == (0, str(directory / "report.html"))
    assert (directory / "report.html").read_text(encoding="utf-8").startswith("<!")
    status, out, _ = call("report", directory, "--out", tmp_path / "page.html")
    assert (status, out.strip()) == (0, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").is_file()


def test_inspect_prints_tasks_and_figures(call: Any, tmp_path: Path) -> None:
    directory = build_run(tmp_path / "run", tasks=["alpha", "beta"])
    status, out, _ = call("inspect", directory)
    assert status == 0
    assert "alpha" in out and "beta" in out and "OP" in out


def test_export_copies_the_adapter_and_prints_where(call: Any, tmp_path: Path) -> None:
    source = tmp_path / "run" / "adapter"
    source.mkdir(parents=True)
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    status, out, _ = call("export", tmp_path / "run", "--out", tmp_path / "mine")
    assert (status, out.strip()) == (0, str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == b"weights"


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "recipe missing.yaml cannot be read"),
        (["report", "missing"], "missing"),
        (["inspect", "missing"], "missing"),
        (["export", "missing", "--out", "there"], "missing is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    call: Any, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("seekr-peft: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_run_into_a_used_folder_is_one_line_and_status_2(call: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "output_dir": str(tmp_path)}))
    status, out, err = call("run", path)
    assert (status, out) == (2, "")
    assert "is not empty and holds no run" in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import seekr_peft.run.runner

    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(seekr_peft.run.runner, "run_recipe", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call("run", "r.yaml")


def test_an_unknown_command_is_status_2(call: Any) -> None:
    status, _, err = call("trian")
    assert status == 2 and "No such command 'trian'" in err
