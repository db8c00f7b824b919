"""The directory of a method's finished tasks: whether it may be written, what is copied into another one, and whether
what it holds is what was written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunError, shown
from ..files.atomic import checksum, read_object, replacing_folder, scratch_folder
from ..files.manifest import METHOD_FILE as STATE_FILE
from ..files.manifest import (
    TASKS_DIRECTORY,
    Ledger,
    StoredFiles,
    files_in,
    folder_damages,
    read_manifest,
    task_folder,
    task_number,
)
from ..files.paths import LONGEST_FOLDER_NAME, is_folder_name


def read_method_state(directory: Path) -> dict[str, Any]:
    """Read ``method.json``; RunError when it is missing, broken, or not what was written."""
    path = directory / STATE_FILE
    StoredFiles(directory).check(path)
    state = read_object(path, "save_pretrained writes it")
    if not isinstance(state.get("tasks"), list):
        raise RunError(f"{path} is broken (it lists no tasks); restore it, or start again in another directory.")
    return state


def delete_unfinished(directory: Path, n_tasks: int) -> None:
    """Delete what a kill between a task's own folder and the list of the ``n_tasks`` finished ones has left."""
    tasks = directory / TASKS_DIRECTORY
    for path in sorted(tasks.iterdir()) if tasks.is_dir() else []:
        if task_number(path.name.removeprefix(".")) == n_tasks + 1 and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def check_new_name(name: str, used: list[str]) -> None:
    """ConfigError where ``name`` is no folder name, or one of the tasks ``used`` before."""
    if not is_folder_name(name):
        raise ConfigError(
            f"task name {shown(name)} must be a folder name of letters, digits, '.', '_' and '-', "
            f"{LONGEST_FOLDER_NAME} at most, starting with a letter or digit."
        )
    if name in used:
        raise ConfigError(f"task name {name!r} is already used in this sequence; give each task its own name.")


def check_base(folders: list[Path], fingerprint: str) -> None:
    """RunError where a task in ``folders`` was trained over another base than that of ``fingerprint``."""
    for folder in folders:
        if read_manifest(folder)["made_from"].get("base") != fingerprint:
            raise RunError(
                f"{folder} was trained over another base model than this one (or in another dtype or quantization); "
                f"load the one that it was trained over."
            )


def check_folder_for(directory: Path, index: int, name: str, class_name: str) -> None:
    """RunError where the folder of the ``index``-th task (from 0) cannot be written inside of ``directory``, or where
    that holds the tasks of another method, which the first one would write over."""
    if index == 0 and (directory / STATE_FILE).is_file():
        there = read_method_state(directory)["tasks"]
        if there:
            raise RunError(
                f"{directory} holds the tasks {', '.join(map(str, there))} already, which this method would write "
                f"over; go on with {class_name}.from_pretrained(model, directory), or choose another."
            )
    target = task_folder(directory, index, name)
    for path in (target.parent, target):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RunError(f"{path} is in the way (a link or a file); move it away, the task is written there.")
    try:
        # Its own folder is only made with the first task.
        with scratch_folder(target.parent if target.parent.is_dir() else _made(directory)):
            pass
    except OSError as error:
        raise RunError(
            f"{target.parent} cannot be written ({error.strerror}), where task {name!r} would be kept; give the "
            f"method another directory, or mend that."
        ) from error


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_same_sequence(directory: Path, names: list[str], manifest_sums: list[str]) -> None:
    """RunError where ``directory`` holds other tasks than the first ones of ``names``, by their manifests' sums."""
    state = read_method_state(directory)
    there, sums = state["tasks"], state.get("manifests")
    told = ", ".join(map(str, there))
    if there[: len(names)] == names and len(there) > len(names):
        raise RunError(
            f"{directory} holds the tasks {told}, more than the {len(names)} of this method; choose another folder, or "
            f"delete it."
        )
    same = there == names[: len(there)] and (sums is None or sums == manifest_sums[: len(there)])
    if not same:
        raise RunError(f"{directory} holds the tasks {told} of another sequence; choose another folder, or delete it.")


def check_stored_tasks(directory: Path, folders: list[Path], adopted: Path) -> list[str] | None:
    """The sums of the manifests of the tasks in ``folders``; None where an earlier version wrote them, which had none.

    Raises:
        RunError: A file of a task, or of ``adopted`` if it is there, is not what was written, or there are other tasks.
    """
    stored = StoredFiles(directory)
    stored.check(*(adopted / name for name in (files_in(adopted) if adopted.is_dir() else [])))
    found = stored.task_folders()[: len(folders)]
    if not found:
        return None
    names = [folder.name for folder, _ in found]
    if names != [folder.name for folder in folders]:
        wanted = ", ".join(folder.name for folder in folders)
        raise RunError(
            f"{stored.directory} holds the tasks {', '.join(names)}, not {wanted}; name those that it holds."
        )
    for folder, manifest_sum in found:
        for damage in folder_damages(folder, manifest_sum):
            raise damage.error(directory)
    return [manifest_sum for _, manifest_sum in found]


def copy_tasks(source: Ledger, target: Ledger, names: list[str], manifest_sums: list[str]) -> None:
    """Copy what the method has written into another directory; a kill in between leaves that one whole."""
    for index, name in enumerate(names):
        folder = task_folder(target.directory, index, name)
        if next(folder_damages(folder, manifest_sums[index]), None) is not None:
            with replacing_folder(folder) as temporary:
                shutil.copytree(task_folder(source.directory, index, name), temporary, dirs_exist_ok=True)
    for name in _written_beside(source):
        (target.directory / name).parent.mkdir(parents=True, exist_ok=True)
        with target.replacing(name) as temporary:
            shutil.copyfile(source.directory / name, temporary)


def _written_beside(ledger: Ledger) -> list[str]:
    """Names of the files beside ``tasks/`` that were written here, but for those that are written anew."""
    files, announced = ledger.read()
    names = [name for name in {**files, **announced} if (ledger.directory / name).is_file()]
    return [name for name in names if name != STATE_FILE and not name.startswith("adapter/")]


def place_folder(written: Path, ledger: Ledger, name: str) -> None:
    """Move the complete folder ``written`` to ``name`` of the ledger's directory, file by file, each one listed."""
    folder = ledger.directory / name
    files = files_in(written)
    ledger.announce({f"{name}/{file}": checksum(written / file) for file in files})
    folder.mkdir(exist_ok=True)
    for file in files:
        os.replace(written / file, folder / file)
    written.rmdir()
