"""Hand the result of a run on: a plain PEFT adapter folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import RunError
from ..files.manifest import StoredFiles
from ..files.paths import given_path

FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_adapter(run_directory: str | Path, out: str | Path) -> Path:
    """Copy ``RUN/adapter``, the sum of all finished tasks' adapters, to ``out``.

    ``PeftModel.from_pretrained(base, out)`` loads it without this package.

    Raises:
        RunError: The run is not finished, its adapter is not what was written, or ``out`` is not empty.
    """
    directory = given_path(run_directory, "the run directory")
    source, target = directory / "adapter", given_path(out, "--out")
    if not directory.is_dir():
        raise RunError(f"{directory} is no folder; give the output_dir of a run.")
    StoredFiles(directory).check(*(source / name for name in FILES))
    missing = [name for name in FILES if not (source / name).is_file()]
    if missing:
        raise RunError(
            f"{source} has no {missing[0]}, so the run is not finished; go on with: seekr-peft run "
            f"{directory / 'recipe.yaml'} --resume."
        )
    _check_config(source / FILES[0])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} is not empty; choose another folder with --out.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target} cannot be made ({error.strerror}); choose another folder with --out.") from error
    for name in FILES:
        shutil.copyfile(source / name, target / name)
    return target


def _check_config(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is no JSON ({error}); the run directory is damaged, run the recipe again.") from error
