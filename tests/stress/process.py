"""Commands of the package as processes that may end in any way.

A process is forked from this one, which has imported everything and started nothing: that takes milliseconds where a
new interpreter takes seconds, and a kill is a kill. ``real`` ones are new interpreters.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 180.0
"""Seconds after which a process hangs."""


@dataclass(frozen=True)
class End:
    """How a process ended: its status (the signal's number below zero where one killed it, None where it hung)."""

    code: int | None
    out: str
    err: str

    @property
    def failed(self) -> bool:
        """Whether it ended in another way than it may: in a traceback, by hanging, with an unknown status."""
        return "Traceback (most recent call last)" in self.err + self.out or self.code not in (0, 2)

    @property
    def refused(self) -> bool:
        """Whether it ended with a sentence."""
        return self.code == 2 and "seekr-peft: " in self.err

    @property
    def last_line(self) -> str:
        """What a person reads last."""
        return (self.err.strip().splitlines() or [""])[-1]

    def __str__(self) -> str:
        return f"status {self.code}: {self.err.strip()[-1500:]}"


@dataclass(frozen=True)
class Signal:
    """A signal ``number`` that comes ``after`` so many seconds."""

    number: int
    after: float


def load_everything() -> None:
    """Import what the commands import, so that the forked ones need not. Nothing may start a thread here, not even
    torch's setting of their number: a forked process would have its pool, without the threads."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"})
    import bitsandbytes  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    import seekr_peft.cli
    import seekr_peft.report
    import seekr_peft.run.export
    import seekr_peft.run.runner  # noqa: F401


def forked(
    call: Callable[[], Any],
    *,
    prepare: Callable[[], Any] = lambda: None,
    sent: Signal | None = None,
    patience: float = PATIENCE,
) -> End:
    """Do ``call`` in a process of its own, after ``prepare`` there."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _be_a_process(call, prepare, out.fileno(), err.fileno(), patience)
        return _ended(pid, out, err, sent, patience)


def command(*arguments: str | Path, **options: Any) -> End:
    """``seekr-peft ARGUMENTS`` in a forked process; options as for ``forked``."""

    def call() -> None:
        from seekr_peft.__main__ import main

        sys.argv = ["seekr-peft", *map(str, arguments)]
        main()

    return forked(call, **options)


def real_command(
    *arguments: str | Path, module: str = "seekr_peft", sent: Signal | None = None, **variables: str
) -> End:
    """``python -m seekr_peft ARGUMENTS`` as a new interpreter; a signal's time counts from when it takes signals."""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        line = [sys.executable, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, preexec_fn=_usual_signals
        )
        if sent is not None and sent.number != signal.SIGKILL:
            _wait_until_caught(process.pid, sent.number)
        end = _ended(process.pid, out, err, sent, PATIENCE)
        process.returncode = end.code or 0
        return end


def _usual_signals() -> None:
    """What is started in the background of a shell ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait_until_caught(pid: int, number: int) -> None:
    """Before that, the signal ends Python itself, which says nothing."""
    bit = 1 << (signal.SIGTERM - 1)
    while _is_running(pid):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(0.002)


def _is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _ended(pid: int, out: Any, err: Any, sent: Signal | None, patience: float) -> End:
    started, hung = time.monotonic(), False
    while _is_running(pid):
        seconds = time.monotonic() - started
        if sent is not None and seconds >= sent.after:
            os.kill(pid, sent.number)
            sent = None
        if seconds > patience and not hung:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.002)
    _, status = os.waitpid(pid, 0)
    for file in (out, err):
        file.seek(0)
    texts = [file.read().decode("utf-8", "replace") for file in (out, err)]
    return End(None if hung else os.waitstatus_to_exitcode(status), *texts)


def _be_a_process(call: Callable[[], Any], prepare: Callable[[], Any], out: int, err: int, patience: float) -> None:
    """All of a forked process; it never returns into what forked it."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        # Where it hangs is the last that it says.
        faulthandler.dump_traceback_later(0.9 * patience, file=2)
        _usual_signals()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        prepare()
        call()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
