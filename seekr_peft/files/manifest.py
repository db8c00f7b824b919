"""What is stored is what was written: checksums of every file of a task, and of a directory's files that change.

``tasks/NN-name/manifest.json`` is written once, with the task: the SHA-256 of each of its files, and what it was made
from: the base, and the manifests of the tasks before it. ``method.json`` holds the manifests' own checksums.
``manifest.json`` of the directory itself (``Ledger``) lists the files beside ``tasks/``. Directories that an earlier
version wrote have neither and are not checked.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError, shown
from .atomic import checksum, read_object, replacing, write_json

MANIFEST_FILE = "manifest.json"
METHOD_FILE = "method.json"
TASKS_DIRECTORY = "tasks"
_SEAL = "checksum"


def advice(directory: Path) -> str:
    """What to do about a damaged file of ``directory``."""
    return f"put that file back, or go on from the last undamaged task: seekr-peft repair {shlex.quote(str(directory))}"


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written: its ``path`` and what is wrong with it."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"

    def error(self, directory: Path) -> RunError:
        """The sentence for a person, with what to do about it in ``directory``."""
        return RunError(f"{self}; {advice(directory)}.")


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` with its own checksum."""
    return {**document, _SEAL: _digest(document)}


def is_sealed(document: Any) -> bool:
    """Whether ``document`` is what ``seal`` made."""
    return isinstance(document, dict) and document.get(_SEAL) == _digest(
        {key: value for key, value in document.items() if key != _SEAL}
    )


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def growing(sha256: str, n_bytes: int) -> dict[str, Any]:
    """How a file is listed of which only the first ``n_bytes`` are checked."""
    return {"sha256": sha256, "bytes": n_bytes}


def files_in(folder: Path) -> list[str]:
    """Names of all files below ``folder``, with slashes, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path, task: str, made_from: dict[str, Any]) -> None:
    """Write the manifest of a task's complete ``folder``."""
    sums = {name: checksum(folder / name) for name in files_in(folder) if name != MANIFEST_FILE}
    write_json(folder / MANIFEST_FILE, seal({"format": 1, "task": task, "made_from": made_from, "files": sums}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a task's folder; RunError when it is missing or damaged."""
    return _read_sealed(folder.parent.parent, folder / MANIFEST_FILE, ("files", "made_from"))


def _read_sealed(directory: Path, path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    document = read_object(path, advice(directory))
    if not is_sealed(document) or not all(isinstance(document.get(key), dict) for key in keys):
        raise Damage(path, "is damaged (its own checksum differs)").error(directory)
    return document


class Ledger:
    """``manifest.json`` of a directory whose files are replaced while it grows.

    A new version of a file is announced before it takes its place, so that after a kill at any moment each file is
    either the one that is listed or the one that was announced.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / MANIFEST_FILE

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Checksums of the listed files and of those announced, by name.

        Raises:
            RunError: The file is missing although a task was finished with it, or it is damaged.
        """
        if not self.path.exists() and not self.path.is_symlink():
            if _has_manifests(self.directory):
                raise Damage(self.path, "is missing").error(self.directory)
            return {}, {}
        document = _read_sealed(self.directory, self.path, ("files", "announced"))
        return document["files"], document["announced"]

    def is_own(self) -> bool:
        """Whether the file is there and is this package's, damaged or not."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(document, dict) and {"files", "announced", _SEAL} <= document.keys()

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """As ``files.replacing``, and the file is listed."""
        with replacing(self.directory / name) as temporary:
            yield temporary
            self.announce({name: checksum(temporary)})

    def write_text(self, name: str, text: str) -> None:
        """Write UTF-8."""
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, document: Any) -> None:
        """Write JSON."""
        self.write_text(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def announce(self, checksums: dict[str, Any]) -> None:
        """Say that the files by these names are about to be replaced; what was announced before has taken place."""
        files, announced = self.read()
        self._write({**files, **announced}, checksums)

    def settle(self) -> None:
        """Say that what was announced has taken place, or, after a kill, that it has not."""
        files, announced = self.read()
        there = {name: entry for name, entry in announced.items() if _differs(self.directory / name, [entry]) is None}
        if announced:
            self._write({**files, **there}, {})

    def replace_all(self, files: dict[str, Any]) -> None:
        """List ``files`` and nothing else."""
        self._write(files, {})

    def note_growing(self, name: str) -> None:
        """List a file that is appended to as it is now."""
        path = self.directory / name
        if path.is_file():
            size = path.stat().st_size
            files, announced = self.read()
            entry = growing(checksum(path, size), size)
            self._write({**files, **announced, name: entry}, {})

    def forget(self, names: Iterable[str]) -> None:
        """Take files off the list, which are about to be removed."""
        files, announced = self.read()
        gone = set(names)
        kept = {name: entry for name, entry in {**files, **announced}.items() if name not in gone}
        if len(kept) < len({**files, **announced}):
            self._write(kept, {})

    def _write(self, files: dict[str, Any], announced: dict[str, Any]) -> None:
        write_json(self.path, seal({"format": 1, "files": dict(sorted(files.items())), "announced": announced}))


class StoredFiles:
    """Reads the manifests of a run, or of what ``save_pretrained`` wrote, and checks files against them."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def check(self, *paths: Path) -> None:
        """RunError for the first of ``paths`` that is not what was written, or is missing. A file that no manifest
        lists is not looked at."""
        for path in paths:
            # A run that goes on may replace a file between the two looks at it.
            found = self._damage_of(path) and self._damage_of(path)
            if found is not None:
                raise found.error(self.directory)

    def check_all(self) -> None:
        """RunError for the first damaged file of all."""
        for damage in self.damages():
            raise damage.error(self.directory)

    def damages(self) -> Iterator[Damage]:
        """Every damaged file, those that the others are checked by first."""
        files: dict[str, Any] = {}
        announced: dict[str, Any] = {}
        try:
            files, announced = Ledger(self.directory).read()
        except RunError as error:
            yield _told(error, self.directory / MANIFEST_FILE)
        for name in {**files, **announced}:
            reason = _why_damaged(self.directory / name, name, files, announced)
            if reason is not None:
                yield Damage(self.directory / name, reason)
        try:
            folders = self.task_folders()
        except RunError as error:
            if METHOD_FILE not in files:
                yield _told(error, self.directory / METHOD_FILE)
            return
        for folder, manifest_sum in folders:
            yield from folder_damages(folder, manifest_sum)

    def listed(self) -> list[Path]:
        """Every file that a manifest lists, whether it is there or not."""
        files, announced = Ledger(self.directory).read()
        own = [self.directory / name for name in {**files, **announced}]
        return own + [folder / name for folder, _ in self.task_folders() for name in read_manifest(folder)["files"]]

    def n_files(self) -> int:
        """How many files are listed, manifests among them."""
        files, announced = Ledger(self.directory).read()
        lists = [read_manifest(folder)["files"] for folder, _ in self.task_folders()]
        return len({**files, **announced}) + bool(files or announced) + sum(1 + len(names) for names in lists)

    def task_folders(self) -> list[tuple[Path, str]]:
        """The finished tasks' folders with the checksums of their manifests; empty where an earlier version wrote them.

        Raises:
            RunError: ``method.json`` is damaged.
        """
        path = self.directory / METHOD_FILE
        if not path.exists():
            return []
        state = read_object(path, advice(self.directory))
        names, sums = state.get("tasks", ()), state.get("manifests")
        if sums is None:
            return []
        if not _are_texts(names) or not _are_texts(sums) or len(names) != len(sums):
            reason = f"is damaged (tasks are {shown(names)}, manifests {shown(sums)})"
            raise Damage(path, reason).error(self.directory)
        return [(task_folder(self.directory, i, name), sums[i]) for i, name in enumerate(names)]

    def _damage_of(self, path: Path) -> Damage | None:
        relative = path.relative_to(self.directory)
        if relative.parts[0] != TASKS_DIRECTORY:
            reason = _why_damaged(path, relative.as_posix(), *Ledger(self.directory).read())
            return None if reason is None else Damage(path, reason)
        self.check(self.directory / METHOD_FILE)
        for folder, manifest_sum in self.task_folders():
            if folder.name == relative.parts[1]:
                named = path.relative_to(folder).as_posix()
                return next(folder_damages(folder, manifest_sum, only=named), None)
        return None


def task_folder(directory: Path, index: int, name: str) -> Path:
    """``tasks/NN-name`` of the ``index``-th task (from 0)."""
    return directory / TASKS_DIRECTORY / f"{index + 1:02d}-{name}"


def task_number(name: str) -> int:
    """The number that the name of a task's folder or file begins with, from 1; 0 for another name."""
    number, dash, _ = name.partition("-")
    return int(number) if dash and number.isdecimal() and len(number) < 10 else 0


def folder_damages(folder: Path, manifest_sum: str | None = None, only: str | None = None) -> Iterator[Damage]:
    """The damaged files of a task's folder, or what is wrong with ``only`` one; ``manifest_sum``: checksum of its
    manifest, where that is known."""
    path = folder / MANIFEST_FILE
    reason = None if manifest_sum is None else _differs(path, [manifest_sum])
    if reason is not None:
        yield Damage(path, reason)
        return
    try:
        files = read_manifest(folder)["files"]
    except RunError as error:
        yield _told(error, path)
        return
    for name in files if only is None else {only} & files.keys():
        reason = _differs(folder / name, [files[name]])
        if reason is not None:
            yield Damage(folder / name, reason)


def _has_manifests(directory: Path) -> bool:
    path = directory / METHOD_FILE
    try:
        return path.is_file() and "manifests" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        # Its reader says what is wrong with it.
        return False


def _why_damaged(path: Path, name: str, files: dict[str, Any], announced: dict[str, Any]) -> str | None:
    entries = [entries[name] for entries in (files, announced) if name in entries]
    if not entries or (name not in files and not path.exists() and not path.is_symlink()):
        return None
    return _differs(path, entries)


def _differs(path: Path, entries: list[Any]) -> str | None:
    """Why ``path`` is none of ``entries`` (checksums, or the checksum of the first bytes); None when it is one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is no file"
        for entry in entries:
            wanted, n_bytes = (entry["sha256"], entry["bytes"]) if isinstance(entry, dict) else (entry, float("inf"))
            if checksum(path, n_bytes) == wanted:
                return None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is not what was written (its checksum differs)"


def _told(error: RunError, path: Path) -> Damage:
    text = str(error).removeprefix(f"{path} ")
    return Damage(path, text.partition(f"; {advice(Path())[:20]}")[0])


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
