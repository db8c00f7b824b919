"""SIGINT and SIGTERM end a run where it can be gone on with, and not in the middle of a step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(SystemExit):
    """A signal asked the run to end, and it has. The exit status is 130 for SIGINT, 143 for SIGTERM; ``message`` says
    how to go on.

    A SystemExit, so that a script that runs a recipe ends with that status and no traceback.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name}; nothing was lost, give the same command again"

    def go_on_with(self, advice: str) -> None:
        """Say how to go on, in place of what was said before."""
        self.message = f"{self.message.partition(';')[0]}; {advice}"


class StopRequest:
    """Whether a signal has come. Outside of ``at_the_next_step`` the first one ends the run at once, inside at its end
    or at ``check``; a second one always at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = 0

    def check(self) -> None:
        """RunStopped when a signal has come."""
        if self.number is not None:
            raise RunStopped(self.number)

    @contextmanager
    def at_the_next_step(self) -> Iterator[None]:
        """What must not be broken off: a signal that comes inside waits for ``check``, or for the end."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
        if not self._waits:
            self.check()

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if again or not self._waits:
            raise RunStopped(number)


_listening: StopRequest | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as a request to stop, and print how to go on when one has ended the block.

    Inside another such block it is that one's. Outside of the main thread, where Python takes no signals, and where the
    process ignores one, nothing changes.
    """
    global _listening
    if _listening is not None:
        yield _listening
        return
    request = StopRequest()
    before = {}
    if threading.current_thread() is threading.main_thread():
        ignored = [number for number in SIGNALS if signal.getsignal(number) in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, request._take) for number in SIGNALS if number not in ignored}
    _listening = request
    try:
        yield request
    except RunStopped as stop:
        print(f"seekr-peft: {stop.message}", file=sys.stderr, flush=True)
        raise
    finally:
        _listening = None
        for number, handler in before.items():
            signal.signal(number, handler)
