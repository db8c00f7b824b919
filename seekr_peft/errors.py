"""Every error that a user of the package can cause; any module may import it.

A message is one sentence that says what was wrong, the value, the place, and what to do. The command line prints a
``SeekrError`` as one line and exits with status 2; anything else is a bug and keeps its traceback. ``shown``, ``cut``,
``listed`` and ``printable`` are for the values in it, which may come from a file that nobody has looked at;
``suggestion`` is for a name that was misspelt.
"""

import re
import reprlib
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

LONGEST_VALUE = 200
"""Characters of a value that a message repeats."""
_LONGEST_NAME_TO_COMPARE = 100

# C0 and C1 controls (ESC and CSI drive a terminal), the marks that change the direction of text, and halves of
# characters, which no stream takes (file names that are not UTF-8 hold them); not the newline.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with every control character written out, as in ``\\x1b``, so that no file's content can drive a
    terminal."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(value: Any, limit: int = LONGEST_VALUE) -> str:
    """``repr(value)`` for a message: cut in the middle to ``limit`` characters, in bounded time whatever the value."""
    return cut(_SHORT.repr(value), limit)


def cut(text: str, limit: int = LONGEST_VALUE) -> str:
    """``text`` on one line, cut in the middle to ``limit`` characters: for a key, a name or a library's words in a
    message."""
    text, half = text.replace("\n", "\\n"), (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[len(text) - half :]}"


def listed(values: Iterable[Any], limit: int = LONGEST_VALUE) -> str:
    """The values with commas between, or "none": as many of the first as make up about ``limit`` characters, on one
    line and without control characters, since a warning may have it too."""
    texts = [cut(printable(str(value)).replace("\n", "\\n"), limit // 2) for value in values]
    lengths = accumulate(len(text) + 2 for text in texts)
    kept = [text for text, length in zip(texts, lengths, strict=True) if length <= limit]
    more = f" and {len(texts) - len(kept)} more" if len(kept) < len(texts) else ""
    return (", ".join(kept) or "none") + more


def closest(name: Any, known: Iterable[Any]) -> str | None:
    """The known name that resembles another one most; long texts, which take long to compare, resemble none."""
    import difflib

    names = [each for each in known if isinstance(each, str) and len(each) <= _LONGEST_NAME_TO_COMPARE]
    lowered = {each.lower(): each for each in names}
    wanted = str(name).lower()
    close = difflib.get_close_matches(wanted[: _LONGEST_NAME_TO_COMPARE + 1], list(lowered), n=1)
    return lowered[close[0]] if close else None


def suggestion(name: Any, known: Iterable[str]) -> str:
    """ " (did you mean 'name'?)" for a misspelt name that resembles a known one, else ''."""
    close = closest(name, known)
    return f" (did you mean {close!r}?)" if close else ""


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 12
        self.maxstring = self.maxother = self.maxlong = 2 * LONGEST_VALUE

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more than 4,300 digits.
        return repr(x) if x.bit_length() < 4096 else f"<a whole number of about {int(x.bit_length() * 0.30103)} digits>"


_SHORT = _ShortRepr()


class SeekrError(Exception):
    """Base of all errors that this package raises on purpose."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in parts))


class ConfigError(SeekrError, ValueError):
    """A setting is unknown, of the wrong type or out of range. ``problems`` holds one sentence a mistake, each once."""

    def __init__(self, problems: str | list[str]) -> None:
        each = [problems] if isinstance(problems, str) else dict.fromkeys(problems)
        self.problems = [printable(problem) for problem in each]
        super().__init__("\n".join(self.problems))


class DataError(SeekrError, ValueError):
    """A task's data is missing, malformed or empty."""


class CaptureError(SeekrError, RuntimeError):
    """The attention of this model cannot be captured in this way."""


class AdapterError(SeekrError, RuntimeError):
    """The adapters of the model are not in the state that the method needs."""


class MemoryFormatError(SeekrError, RuntimeError):
    """A replay memory on disk is missing, cut off, of another format or of another model."""


class DivergenceError(SeekrError, ArithmeticError):
    """A loss, a gradient or an adapter became infinite or no number while a task was trained; that task is dropped."""


class RunError(SeekrError, RuntimeError):
    """A run directory is missing, in use, finished, or belongs to another recipe."""


class RunInUseError(RunError):
    """Another process is working on the run directory."""
