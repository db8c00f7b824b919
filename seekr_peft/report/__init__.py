"""What a run looks like: one HTML page, its figures, and a summary for the terminal.

``reading`` turns a run directory into a ``RunRecord``, ``figures`` draws it, ``page`` writes it and ``inspect`` prints
it; nothing here imports torch, and matplotlib is loaded only when a page is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inspect import render_inspection
    from .page import write_report
    from .reading import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render_inspection", "write_report"]

_HOME = {
    "RunRecord": "reading",
    "read_run": "reading",
    "render_inspection": "inspect",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    """Load the module a public name lives in on first use, so that reading a run needs no
    matplotlib.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
