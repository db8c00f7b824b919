"""The entry of the command line.

Signals are taken before anything heavy is imported, so that a command that is stopped while it starts ends like one
that is stopped later.
"""

import signal

from .training.stopping import SIGNALS, listening


def main() -> None:
    """Run the command line; ends with its status."""
    try:
        with listening():
            from .cli import main as command_line

            command_line()
    finally:
        # All is done or told: a signal during Python's own end would only change the status.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
