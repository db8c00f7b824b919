"""The command line, called as a process would and without one."""

from __future__ import annotations

import sys

import pytest

from seekr_peft import cli


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["seekr-peft", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exited:
        return int(exited.code or 0)
    return 0
