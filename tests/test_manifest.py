"""What is stored is what was written: every file is checked where it is read, and named when it is not."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.damages import DAMAGES, damaged_names, flip
from support.small_run import TASKS, read_json, small_recipe

import seekr_peft.files.atomic as files_module
from seekr_peft import run_recipe
from seekr_peft.errors import RunError
from seekr_peft.files.atomic import checksum, partial_path, replacing, save_tensors, write_json, write_text
from seekr_peft.files.manifest import (
    MANIFEST_FILE,
    Ledger,
    StoredFiles,
    folder_damages,
    is_sealed,
    read_manifest,
    seal,
    task_number,
    write_manifest,
)
from seekr_peft.report import render_inspection, write_report
from seekr_peft.run.export import export_adapter
from seekr_peft.run.repair import verify

FOLDERS = [f"{number:02d}-{name}" for number, name in enumerate(TASKS, start=1)]
UNLISTED = {"report.html", ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(small_recipe(directory), console=Console(quiet=True))
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def resume(directory: Path) -> None:
    run_recipe(small_recipe(directory), resume=True, console=Console(quiet=True), report=False)


def listed_files(directory: Path) -> list[str]:
    found = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file()]
    return [path.as_posix() for path in found if path.parts[0] not in (*UNLISTED, "figures")]


# Every file is listed, and what it was made from ------------------------------------------------------------------


def test_every_file_of_a_run_has_its_checksum(whole: Path) -> None:
    ledger = read_json(whole / MANIFEST_FILE)
    assert is_sealed(ledger) and ledger["announced"] == {}
    sums: dict[str, Any] = dict(ledger["files"])
    for folder in FOLDERS:
        manifest = read_json(whole / "tasks" / folder / MANIFEST_FILE)
        assert is_sealed(manifest)
        sums |= {f"tasks/{folder}/{name}": value for name, value in manifest["files"].items()}
        sums[f"tasks/{folder}/{MANIFEST_FILE}"] = checksum(whole / "tasks" / folder / MANIFEST_FILE)
    assert sums.pop("metrics.jsonl") == {
        "sha256": checksum(whole / "metrics.jsonl"),
        "bytes": (whole / "metrics.jsonl").stat().st_size,
    }
    assert {*sums, MANIFEST_FILE, "metrics.jsonl"} == set(listed_files(whole))
    assert {name: checksum(whole / name) for name in sums} == sums


def test_a_manifest_says_what_its_task_was_made_from(whole: Path) -> None:
    manifests = [read_manifest(whole / "tasks" / folder) for folder in FOLDERS]
    sums = [checksum(whole / "tasks" / folder / MANIFEST_FILE) for folder in FOLDERS]
    base = read_json(whole / "environment.json")["base"]
    data = {fact["name"]: fact["fingerprint"] for fact in read_json(whole / "tasks.json")}
    for place, (name, manifest) in enumerate(zip(TASKS, manifests, strict=True)):
        made_from = manifest["made_from"]
        assert manifest["task"] == made_from["task"] == name
        assert made_from["base"] == base and base.startswith("sha256:")
        assert made_from["earlier"] == sums[:place]
        assert made_from["data"] == {name: data[name]}
    assert read_json(whole / "method.json")["manifests"] == sums
    assert len({manifest["made_from"]["recipe"] for manifest in manifests}) == 1


def test_a_whole_run_verifies(whole: Path) -> None:
    n_files = len(listed_files(whole))
    assert verify(whole) == f"{whole}: all {n_files} files are what was written."


# Every file is checked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("name", damaged_names())
def test_a_damaged_file_is_named_by_resume_and_verify(name: str, damage: str, run: Path) -> None:
    DAMAGES[damage](run / name)
    for refused in (lambda: resume(run), lambda: verify(run)):
        with pytest.raises(RunError, match=str(run / name)) as caught:
            refused()
        assert f"seekr-peft repair {run}" in str(caught.value)


READ_BY = {
    "export": (lambda run: export_adapter(run, run.parent / "out"), ["adapter/adapter_model.safetensors",
               "adapter/adapter_config.json"]),
    "report": (write_report, ["state.json", "environment.json", "recipe.yaml", "accuracy_matrix.json", "metrics.jsonl",
               "importance.safetensors", "tasks/02-last/memory.json", "predictions/03-third/01-first.jsonl"]),
    "inspect": (lambda run: render_inspection(run, Console(quiet=True)), ["state.json", "accuracy_matrix.json",
                "importance.safetensors", "tasks/01-first/memory.json"]),
}  # fmt: skip


@pytest.mark.parametrize(("command", "name"), [(c, name) for c, (_, names) in READ_BY.items() for name in names])
def test_what_a_command_reads_is_checked(command: str, name: str, run: Path) -> None:
    flip(run / name)
    with pytest.raises(RunError, match=str(run / name)):
        READ_BY[command][0](run)
    assert not (run.parent / "out").exists()


def test_swapped_files_are_named(run: Path) -> None:
    one, other = (run / "tasks" / folder / "memory.safetensors" for folder in FOLDERS[:2])
    swapped = one.read_bytes(), other.read_bytes()
    one.write_bytes(swapped[1]), other.write_bytes(swapped[0])
    with pytest.raises(RunError, match=r"01-first/memory\.safetensors is not what was written"):
        resume(run)
    with pytest.raises(RunError) as caught:
        verify(run)
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines[1:]] == [str(one), str(other)]


def test_swapped_tasks_and_an_older_state_are_named(run: Path, tmp_path: Path) -> None:
    first, second = (run / "tasks" / folder for folder in FOLDERS[:2])
    first.rename(tmp_path / "kept"), second.rename(first), (tmp_path / "kept").rename(second)
    with pytest.raises(RunError, match=r"01-first/manifest\.json is not what was written"):
        resume(run)


def test_a_growing_file_may_have_grown_since(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"task_index": 3}\n{"half')
    assert "are what was written" in verify(run)


def test_what_an_earlier_version_wrote_is_read_and_listed_from_then_on(run: Path) -> None:
    """It had neither manifests nor a task's own scores of the heads."""
    for path in [run / MANIFEST_FILE, *run.glob("tasks/*/manifest.json"), *run.glob("tasks/*/importance.safetensors")]:
        path.unlink()
    method = read_json(run / "method.json")
    del method["manifests"]
    (run / "method.json").write_text(json.dumps(method))
    with pytest.raises(RunError, match=r"has no manifest\.json, so nothing in it can be checked"):
        verify(run)
    shutil.rmtree(run / "tasks" / FOLDERS[2])
    (run / "method.json").write_text(json.dumps({**method, "tasks": TASKS[:2]}))
    (run / "state.json").write_text(json.dumps({"finished_tasks": 2, "tasks": TASKS, "status": "running"}))
    matrix = read_json(run / "accuracy_matrix.json")
    matrix["scores"] = [[*row[:2], None] for row in matrix["scores"]]
    (run / "accuracy_matrix.json").write_text(json.dumps(matrix))
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    resume(run)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert all((run / "tasks" / folder / MANIFEST_FILE).is_file() for folder in FOLDERS)
    flip(run / "tasks" / FOLDERS[0] / "memory.safetensors")
    with pytest.raises(RunError, match=r"01-first/memory\.safetensors is not what was written"):
        verify(run)


# The parts ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4), st.text(max_size=3))
@settings(max_examples=50)
def test_a_seal_is_broken_by_any_change(document: dict[str, Any], key: str) -> None:
    document.pop("checksum", None)
    sealed = seal(document)
    assert is_sealed(sealed) and is_sealed(json.loads(json.dumps(sealed)))
    assert not is_sealed({**sealed, key: "another"}) or sealed.get(key) == "another"
    assert not is_sealed(document) and not is_sealed([]) and not is_sealed(None)


def test_a_file_is_the_listed_one_or_the_announced_one(tmp_path: Path) -> None:
    """The moments at which a kill may come while a file is replaced."""
    ledger, stored, path = Ledger(tmp_path), StoredFiles(tmp_path), tmp_path / "a"
    ledger.announce({"a": checksum_of("one")})
    stored.check_all()
    path.write_text("one")
    stored.check_all()
    ledger.announce({"a": checksum_of("two")})
    stored.check_all()
    path.write_text("two")
    stored.check_all()
    path.write_text("three")
    with pytest.raises(RunError, match="a is not what was written"):
        stored.check(path)
    path.unlink()
    with pytest.raises(RunError, match="a is missing"):
        stored.check(path)
    path.write_text("one")
    ledger.settle()
    assert ledger.read() == ({"a": checksum_of("one")}, {})
    stored.check_all()
    ledger.forget(["a", "b"])
    path.unlink()
    assert ledger.read() == ({}, {})
    stored.check_all()


def checksum_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_of_a_task_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "01-a"
    folder.mkdir(parents=True)
    (folder / "x").write_text("1"), (folder / "sub").mkdir(), (folder / "sub" / "y").write_text("2")
    write_manifest(folder, "a", {"base": "b"})
    assert read_manifest(folder)["files"] == {"sub/y": checksum_of("2"), "x": checksum_of("1")}
    assert list(folder_damages(folder)) == []
    (folder / "sub" / "y").write_text("3")
    (damage,) = folder_damages(folder)
    assert str(damage) == f"{folder}/sub/y is not what was written (its checksum differs)"
    (damage,) = folder_damages(folder, "0" * 64)
    assert damage.path == folder / MANIFEST_FILE


@pytest.mark.parametrize(
    ("name", "number"), [("01-a", 1), ("12-b-c", 12), ("a-1", 0), ("7", 0), ("-", 0), ("9" * 30 + "-a", 0)]
)
def test_the_number_of_a_task(name: str, number: int) -> None:
    assert task_number(name) == number


# Single files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_a_run_has_the_mode_of_a_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run_recipe(small_recipe(tmp_path / "run", n_tasks=1), console=Console(quiet=True), report=False)
        (tmp_path / "neighbour").touch()
    finally:
        os.umask(before)
    wanted = stat.S_IMODE((tmp_path / "neighbour").stat().st_mode)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path: mode for path, mode in modes.items() if mode != wanted and path.name != ".lock"} == {}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    import torch

    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    save_tensors({"x": torch.ones(2)}, tmp_path / "b")
    with pytest.raises(NotImplementedError):
        save_tensors({"x": torch.ones(2, device="meta")}, tmp_path / "b")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a", {"old": 1})

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(files_module.os, "replace", killed)
    with pytest.raises(Killed):
        write_json(tmp_path / "a", {"new": 2})
    assert read_json(tmp_path / "a") == {"old": 1}
    assert not partial_path(tmp_path / "a").exists()
