"""Every error that a user of the package can cause. Imports nothing; any module may import it.

A message is one sentence that says what was wrong, the value, the place, and what to do. The command line prints a
``SeekrError`` as one line and exits with status 2; anything else is a bug and keeps its traceback.
"""


class SeekrError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(SeekrError, ValueError):
    """A setting is unknown, of the wrong type or out of range. ``problems`` holds one sentence a mistake, each once."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(dict.fromkeys(problems))
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
