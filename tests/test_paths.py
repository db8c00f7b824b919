"""Paths that a user gave: whatever no file system takes, or what would hang, is one sentence at the door."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.run_directory_fixture import build_run

from seekr_peft import cli
from seekr_peft.compare.reading import load_comparison
from seekr_peft.errors import ConfigError, RunError, SeekrError
from seekr_peft.files.paths import given_path, path_problem
from seekr_peft.methods import get_method
from seekr_peft.recipe import load_recipe
from seekr_peft.report import write_report
from seekr_peft.run.export import export_adapter
from seekr_peft.run.repair import repair, verify


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def inside_a_file(folder: Path) -> Path:
    (folder / "file").write_text("text")
    return folder / "file" / "run"


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda folder: "", "is empty"),
    "blank": (lambda folder: "  ", "is empty"),
    "NUL": (lambda folder: str(folder / "a\0b"), "holds a NUL character"),
    "half a character": (lambda folder: str(folder / "a\ud800"), "holds half a character"),
    "a long name": (lambda folder: folder / ("x" * 256), r"cannot be used \(a name has more than 255 bytes\)"),
    "a long path": (lambda folder: folder / "/".join(["y" * 200] * 30), r"cannot be used \(File name too long\)"),
    "a loop": (loop, r"cannot be used \(Too many levels of symbolic links\)"),
    "inside a loop": (lambda folder: loop(folder) / "run", r"cannot be used \(Too many levels of symbolic links\)"),
    "inside a file": (inside_a_file, r"cannot be used \(Not a directory\)"),
    "a pipe": (pipe, "is a named pipe, neither a file nor a folder"),
    "a device": (lambda folder: "/dev/zero", "is a device, neither a file nor a folder"),
    "an unknown home": (lambda folder: "~nobody-of-this-name/run", "begins with the home of a user who is not known"),
}
every_bad_path = pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)


@every_bad_path
def test_a_bad_path_is_one_bounded_sentence(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(RunError, match=rf"^RUN .* {message}.*; give another path\.$") as caught:
        given_path(make(tmp_path), "RUN")
    assert len(str(caught.value)) < 450 and "\0" not in str(caught.value)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("path", [None, 5, b"run", ["run"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    assert path_problem(path) == "is no path"


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        assert path_problem("socket") == "is a socket, neither a file nor a folder"


def test_good_paths_are_taken_and_home_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/runs", "RUN") == tmp_path / "runs"
    for good in (tmp_path, tmp_path / "new" / "run", str(tmp_path / ".." / "x"), "x" * 255, os.fsdecode(b"a\xff")):
        assert given_path(good, "RUN") == Path(good)


# Python ---------------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "load_recipe": lambda path, run: load_recipe(path),
    "write_report": lambda path, run: write_report(path),
    "write_report, out": lambda path, run: write_report(run, path),
    "load_comparison": lambda path, run: load_comparison(path),
    "export_adapter": lambda path, run: export_adapter(path, run.parent / "out"),
    "export_adapter, out": lambda path, run: export_adapter(run, path),
    "repair": lambda path, run: repair(path),
    "verify": lambda path, run: verify(path),
    "from_pretrained": lambda path, run: get_method("seekr").from_pretrained(None, path),
}


@every_bad_path
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_that_takes_a_path_refuses_a_bad_one(
    tmp_path: Path, call: Callable[[Any, Path], Any], make: Any, message: str
) -> None:
    # A Path that is empty is the folder here.
    path = make(tmp_path)
    with pytest.raises(SeekrError, match=message) as caught:
        call(path if isinstance(path, str) else str(path), build_run(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@every_bad_path
@pytest.mark.parametrize(
    "key", ["output_dir", "model.name_or_path", "tasks.path", "evaluation.general_path", "compare.runs_dir", "extends"]
)
def test_every_path_in_a_recipe_is_looked_at(tmp_path: Path, key: str, make: Any, message: str) -> None:
    recipe: dict[str, Any] = {"model": {"name_or_path": "demo"}, "tasks": {"format": "jsonl", "path": str(tmp_path)}}
    section, _, name = key.rpartition(".")
    (recipe.setdefault(section, {}) if section else recipe)[name] = str(make(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    # YAML has no control characters, and another recipe is read like the first one.
    message += "|holds control characters" + ("|cannot be read|is not|must be|extends is" if key == "extends" else "")
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1


def test_the_home_folder_is_filled_in_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = {"model": {"name_or_path": "demo"}, "tasks": {"format": "demo"}, "output_dir": "~/runs/a"}
    assert load_recipe(recipe).output_dir == str(tmp_path / "runs" / "a")
    assert recipe["output_dir"] == "~/runs/a"


def test_a_pipe_among_the_tasks_files_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    from seekr_peft.errors import DataError
    from seekr_peft.tasks.table_files import read_text

    with pytest.raises(DataError, match="pipe"):
        read_text(pipe(tmp_path))


# The command line -----------------------------------------------------------------------------------------------------


def status_and_lines(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[Any, list[str]]:
    monkeypatch.setattr(sys, "argv", ["seekr-peft", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["x" * 256, "loop", "pipe", "/dev/zero", "file/run", "~nobody-of-this-name", " "])
@pytest.mark.parametrize(
    "arguments",
    [["run", "?"], ["run", "?", "--check"], ["doctor", "?"], ["compare", "?", "--check"], ["report", "?"],
     ["report", "run", "--out", "?"], ["inspect", "?"], ["inspect", "?", "--verify"], ["repair", "?"],
     ["export", "?", "--out", "new"], ["export", "run", "--out", "?"], ["demo", "--out", "?"]],
    ids=" ".join,
)  # fmt: skip
def test_a_bad_path_on_the_command_line_is_one_line_and_status_2(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    build_run(tmp_path / "run")
    loop(tmp_path), pipe(tmp_path), inside_a_file(tmp_path)
    code, lines = status_and_lines([name if part == "?" else part for part in arguments], monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("seekr-peft: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "No", "/a/\x1bb"), r"seekr-peft: /a/\x1bb: No; check that path."),
        (OSError(5, "Input/output error"), "seekr-peft: a file: Input/output error; check that path."),
        (OSError("odd"), "seekr-peft: a file: odd; check that path."),
        (ValueError("embedded null byte"), "seekr-peft: a path holds what no file name can (embedded null byte); check "
         "the paths that were given."),
    ],
)  # fmt: skip
def test_what_the_system_refuses_further_in_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert status_and_lines([], monkeypatch, capsys) == (2, [line])


def test_a_value_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    directory = build_run(tmp_path / "run")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "seekr_peft", "inspect", str(directory)]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert ended.stderr == b"" and ended.returncode == 1
