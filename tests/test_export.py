"""Export: the adapter of a finished run, copied as it is, into an empty folder only."""

from __future__ import annotations

from pathlib import Path

import pytest

from seekr_peft.errors import RunError
from seekr_peft.run.export import FILES, export_adapter


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "README.md").write_text("not needed")
    return tmp_path / "run"


def test_the_two_files_of_an_adapter_are_copied(finished: Path, tmp_path: Path) -> None:
    out = export_adapter(finished, tmp_path / "a" / "b")
    assert out == tmp_path / "a" / "b"
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (out / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_an_empty_folder_is_a_fine_target(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (export_adapter(finished, tmp_path / "empty") / FILES[0]).is_file()


@pytest.mark.parametrize("missing", FILES)
def test_an_unfinished_run_is_refused(finished: Path, tmp_path: Path, missing: str) -> None:
    (finished / "adapter" / missing).unlink()
    with pytest.raises(RunError, match=rf"has no {missing}, so the run is not finished; .*--resume"):
        export_adapter(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_with_files_is_refused_and_left_alone(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "adapter_config.json").write_text("mine")
    with pytest.raises(RunError, match="is not empty; choose another folder with --out"):
        export_adapter(finished, target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("adapter_config.json", "mine")]


def test_a_target_that_is_or_lies_under_a_file_is_refused(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        export_adapter(finished, file)
    with pytest.raises(RunError, match=r"cannot be (made|used)"):
        export_adapter(finished, file / "out")
    assert file.read_text() == "mine"


def test_a_run_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is no folder; give the output_dir of a run"):
        export_adapter(tmp_path / "nowhere", tmp_path / "out")


def test_a_damaged_configuration_is_refused_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    (finished / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(RunError, match=r"adapter_config\.json is no JSON .* damaged"):
        export_adapter(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()
