"""Writing and reading single files: whole or not at all, with the modes of their neighbours, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RunError

_BLOCK = 1 << 20


def partial_path(path: Path) -> Path:
    """Where ``path`` is written before it is moved to its place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which replaces ``path`` at the end: readers see one of the two.

    It gets the mode that ``open`` gives to a new file here: safetensors makes its files readable by their owner alone,
    so that another user could read a run's JSON but not its tensors.
    """
    temporary = partial_path(path)
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it; after a kill in between it has gone by its name."""
    hidden = partial_path(path)
    shutil.rmtree(hidden, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: what is there is removed once the new one is complete."""
    temporary = partial_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder``, on the same disk, which is gone at the end."""
    scratch = folder / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; a reader sees the old file or the new one, never half of one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes; a reader sees the old file or the new one, never half of one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def as_json(document: Any) -> str:
    """The text that ``write_json`` writes."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, document: Any) -> None:
    """Write JSON; a reader sees the old file or the new one, never half of one."""
    write_text(path, as_json(document))


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write safetensors; a reader sees the old file or the new one, never half of one."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(tensors, temporary)


def checksum(path: Path, n_bytes: float = float("inf")) -> str:
    """SHA-256 of a file, or of its first ``n_bytes``, as hexadecimal text; OSError where it cannot be read."""
    digest = hashlib.sha256()
    # hashlib.file_digest is of Python 3.11.
    with path.open("rb") as file:
        while n_bytes > 0 and (block := file.read(int(min(n_bytes, _BLOCK)))):
            digest.update(block)
            n_bytes -= len(block)
    return digest.hexdigest()


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in ``path``; RunError, which ends with ``advice``, when it cannot be read or is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{path} cannot be read ({reason}); {advice}.") from error
    if not isinstance(document, dict):
        raise RunError(f"{path} is broken (no JSON object); {advice}.")
    return document
