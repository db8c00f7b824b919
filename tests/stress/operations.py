"""What a process does to the files below one folder, counted; and something that happens right before the N-th of it.

Run as ``python -m stress.operations ARGUMENTS`` it is ``python -m seekr_peft ARGUMENTS`` that kills itself before the
operation that ``STRESS_AT`` numbers (from 0), below the folder ``STRESS_FOLDER``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# How many of an event's arguments are paths, and how many descriptors of the folders that they are relative to end it.
_EVENTS = {
    "open": (1, 0), "os.rename": (2, 2), "os.remove": (1, 1), "os.mkdir": (1, 1), "os.rmdir": (1, 1),
    "os.chmod": (1, 1), "os.truncate": (1, 0), "os.link": (2, 2), "os.symlink": (2, 1),
    "shutil.rmtree": (1, 0), "shutil.copyfile": (2, 0), "shutil.copytree": (2, 0), "shutil.move": (2, 0),
}  # fmt: skip


def watch(folder: Path, seen: Callable[[int, str], None]) -> None:
    """From now on, ``seen(number, text)`` is called before each operation below ``folder``: a file that is opened to
    be written, renamed, removed; a folder that is made or removed. Files that libraries write without Python's
    knowledge (safetensors) show by what is done to them before and after."""
    root, count = f"{folder.resolve()}{os.sep}", 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or (event == "open" and not _is_writing(*arguments[1:3])):
            return
        path = next((path for path in _paths(event, arguments) if path.startswith(root) or path == root[:-1]), None)
        if path is not None:
            number, count = count, count + 1
            seen(number, f"{event} {path.removeprefix(root)}")

    sys.addaudithook(hook)


def kill_self(at: int) -> Callable[[int, str], None]:
    """What ``watch`` is to call for a kill before operation ``at``."""
    return signal_self(at, signal.SIGKILL)


def signal_self(at: int, number: int) -> Callable[[int, str], None]:
    """The same for another signal."""

    def act(count: int, text: str) -> None:
        if count == at:
            os.kill(os.getpid(), number)

    return act


def _is_writing(mode: Any, flags: Any) -> bool:
    return any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    n_paths, n_folders = _EVENTS[event]
    folders = arguments[-n_folders:] if n_folders else ()
    found = []
    for place, path in enumerate(arguments[:n_paths]):
        if not isinstance(path, int):
            folder = folders[min(place, len(folders) - 1)] if folders else -1
            base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
            found.append(os.path.join(base, os.fsdecode(path)))
    return found


if __name__ == "__main__":
    from seekr_peft.__main__ import main

    watch(Path(os.environ["STRESS_FOLDER"]), kill_self(int(os.environ["STRESS_AT"])))
    main()
