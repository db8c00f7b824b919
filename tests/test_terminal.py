"""No character that drives a terminal reaches it from a file's content or a name, whatever the command prints."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.table import Table
from support.run_directory_fixture import build_run
from support.small_run import small_recipe

from seekr_peft import cli
from seekr_peft.report import write_report
from seekr_peft.run.progress import RunProgress
from seekr_peft.terminal import TerminalConsole, clean_terminal

HOSTILE = "a\x1b]0;title\x07b\x1b[31mc\x9bd\u202ee"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TASKS = [HOSTILE, "plain"]


def clean(text: str) -> str:
    assert not CONTROL.search(text), ascii(CONTROL.search(text))
    return text


def hostile_run(folder: Path) -> Path:
    """Names and contents of files, and the folder's own name."""
    return build_run(folder / HOSTILE, tasks=TASKS, prediction=HOSTILE, method="seekr")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["seekr-peft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), clean(printed.out) + clean(printed.err)

    return run


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["inspect", "RUN"], 0), (["inspect", "RUN", "--verify"], 2), (["report", "RUN"], 0), (["repair", "RUN"], 2)],
)
def test_a_command_on_a_run_with_hostile_names_prints_them_written_out(
    call: Any, tmp_path: Path, arguments: list[str], status: int
) -> None:
    directory = hostile_run(tmp_path)
    found, printed = call(*(directory if part == "RUN" else part for part in arguments))
    assert found == status
    if arguments != ["repair", "RUN"]:
        assert "\\x1b" in printed


def test_the_pages_and_tables_of_a_run_hold_none(tmp_path: Path) -> None:
    page = write_report(hostile_run(tmp_path)).read_text(encoding="utf-8")
    assert "\\x1b]0;title\\x07b\\x1b[31mc\\x9bd\\u202ee" in clean(page)


@pytest.mark.parametrize("key", ["output_dir", "model.name_or_path", "tasks.path", HOSTILE, f"method.{HOSTILE}"])
def test_a_recipe_with_hostile_values_and_keys(call: Any, tmp_path: Path, key: str) -> None:
    recipe: dict[str, Any] = small_recipe(tmp_path / "run")
    section, _, name = key.rpartition(".")
    (recipe[section] if section else recipe)[name] = str(tmp_path / HOSTILE)
    path = tmp_path / f"{HOSTILE}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    status, printed = call("run", path, "--check")
    assert status == 2 and "\\x1b" in printed


def test_doctor_on_a_base_with_a_hostile_name(call: Any, tmp_path: Path) -> None:
    import shutil

    from seekr_peft.demo import BASE_PATH

    base = shutil.copytree(BASE_PATH, tmp_path / HOSTILE)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path / "run", model={"name_or_path": str(base)})))
    status, printed = call("doctor", path)
    assert status == 2 and "holds control characters" in printed and "\\x1b" in printed


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_writes_its_own_sequences_alone(terminal: bool) -> None:
    file = io.StringIO()
    console = TerminalConsole(file=file, force_terminal=terminal, width=200)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE, style="red")
    table.add_row(HOSTILE)
    console.print(HOSTILE, HOSTILE, style="bold", markup=False)
    console.print(table)
    with RunProgress(console) as progress:
        progress.say(HOSTILE)
        progress.update(progress.start(HOSTILE, 3), 1, HOSTILE)
    written = file.getvalue()
    # rich's own: colours, the cursor, the bar's line.
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", written)
    assert "title\\x07b" in clean(own)
    assert ("\x1b[31m" in written) == terminal and "\x1b]" not in written and "\x07" not in written


def test_a_console_of_the_users_own_gets_progress_lines_that_are_clean() -> None:
    file = io.StringIO()
    RunProgress(Console(file=file)).say(HOSTILE)
    clean(file.getvalue())


def test_messages_and_warnings_of_any_library_are_clean_and_all_is_as_before_afterwards() -> None:
    before = logging.getLogRecordFactory(), warnings.formatwarning
    with clean_terminal():
        record = logging.getLogger("any").makeRecord("any", logging.WARNING, "f", 1, "%s", (HOSTILE,), None)
        assert record.getMessage().startswith("a\\x1b]0;title\\x07b")
        clean(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, HOSTILE, 1, HOSTILE))
    assert before == (logging.getLogRecordFactory(), warnings.formatwarning)


@pytest.mark.parametrize("command", [["inspect", "RUN"], ["report", "RUN"], ["inspect", "missing – run"], ["--help"]])
def test_a_terminal_of_ascii_takes_every_command(tmp_path: Path, command: list[str]) -> None:
    directory = build_run(tmp_path / "übung", tasks=["größte", "再见"])
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "seekr_peft", *(str(directory) if part == "RUN" else part for part in command)],
        env={**os.environ, **ascii_only},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in ended.stderr and ended.returncode == (2 if "missing – run" in command else 0)
    ended.stdout.decode("ascii"), ended.stderr.decode("ascii")


def test_a_folder_whose_name_is_not_utf_8_is_named(call: Any, tmp_path: Path) -> None:
    status, printed = call("inspect", tmp_path / os.fsdecode(b"run\xff"))
    assert status == 2 and "run\\udcff" in printed


def test_json_files_keep_what_they_are_told(tmp_path: Path) -> None:
    assert json.loads((hostile_run(tmp_path) / "state.json").read_text())["tasks"] == TASKS
