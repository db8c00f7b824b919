"""What reaches the terminal: text from files and names without the characters that would drive it."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.segment import Segment

from .errors import printable


class TerminalConsole(Console):
    """rich's console, whose own sequences are the only ones that it writes: those in a text are written out."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


@contextmanager
def clean_terminal() -> Iterator[None]:
    """Let no message or warning of any library drive the terminal, nor a character that it has no code for stop a
    command."""
    factory, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def printable_warning(*arguments: Any, **options: Any) -> str:
        return printable(format_warning(*arguments, **options))

    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = printable_warning
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_warning
