"""Fixtures of several files of tests: a run that was never stopped, and runs without a page."""

from __future__ import annotations

from pathlib import Path

import pytest

import seekr_peft.run.runner as run_module

from .runs import run
from .small_run import small_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks that was never stopped; tests only read it."""
    return run(small_recipe(tmp_path_factory.mktemp("run") / "seekr")).directory


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than such a training."""
    monkeypatch.setattr(run_module, "write_report", lambda directory: directory / "report.html")
