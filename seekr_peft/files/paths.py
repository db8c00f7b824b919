"""Paths that a user gave, checked at the door through which they come in.

What the operating system refuses (a name that is too long, a loop of links, a file on the way) or what would hang (a
pipe, a device) is one sentence here and nothing further in.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from ..errors import RunError, SeekrError, shown

_LONGEST_NAME = 255
LONGEST_FOLDER_NAME = 200
"""Characters of the name of a task: file names have 255 at most, and a run adds a number and an ending."""
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def given_path(path: Any, what: str, error: type[SeekrError] = RunError) -> Path:
    """``path`` as a ``Path`` with ``~`` filled in; it need not be there.

    Args:
        what: How the sentence begins, as in "recipe" or "output_dir".

    Raises:
        error: It is no path, empty, holds NUL or half a character, is too long, leads through a file or in a circle,
            must not be looked at, or is neither a file nor a folder.
    """
    if problem := path_problem(path):
        raise error(f"{what} {shown(_text(path))} {problem}; give another path.")
    return Path(path).expanduser()


def path_problem(path: Any) -> str | None:
    """What is wrong with a path that a user gave, as the rest of a sentence; None for one that can be used."""
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        return "is no path"
    # An empty Path is the folder here.
    if not _text(path).strip():
        return "is empty"
    try:
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):
            return f"cannot be used (a name has more than {_LONGEST_NAME} bytes)"
        return special_kind(Path(path).expanduser())
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be used ({reason(error)})"
    except UnicodeEncodeError:
        return "holds half a character, which no file name can"
    except ValueError:
        return "holds a NUL character, which no file name can"
    except RuntimeError:
        return "begins with the home of a user who is not known here"


def is_folder_name(name: Any) -> bool:
    """Whether ``name``, as of a task, can be a folder's on any system: letters, digits, '.', '_' and '-', the first a
    letter or digit, at most ``LONGEST_FOLDER_NAME``."""
    return isinstance(name, str) and len(name) <= LONGEST_FOLDER_NAME and bool(_FOLDER_NAME.fullmatch(name))


def special_kind(path: Path) -> str | None:
    """ "is a named pipe, ..." and the like for what is neither a file nor a folder; OSError when it cannot be told."""
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    return f"is {kind}, neither a file nor a folder" if kind else None


def reason(error: OSError) -> str:
    """Why the operating system refused, in its own words."""
    return error.strerror or str(error) or type(error).__name__


def _text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path
