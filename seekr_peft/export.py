"""Hand the result of a run on: a plain PEFT adapter folder. May import ``manifest`` and ``errors``; loads no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .errors import RunError
from .manifest import StoredFiles

FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_adapter(run_directory: str | Path, out: str | Path) -> Path:
    """Copy ``RUN/adapter``, the sum of all finished tasks' adapters, to ``out``.

    ``PeftModel.from_pretrained(base, out)`` loads it without this package.

    Raises:
        RunError: The run is not finished, its adapter is not what was written, or ``out`` is not empty.
    """
    source, target = Path(run_directory) / "adapter", Path(out)
    if not Path(run_directory).is_dir():
        raise RunError(f"{run_directory} is no folder; give the output_dir of a run.")
    StoredFiles(Path(run_directory)).check(*(source / name for name in FILES))
    missing = [name for name in FILES if not (source / name).is_file()]
    if missing:
        raise RunError(
            f"{source} has no {missing[0]}, so the run is not finished; go on with: seekr-peft run "
            f"{Path(run_directory) / 'recipe.yaml'} --resume."
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
