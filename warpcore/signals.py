"""The signals that ask a run to save and stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""From whoever ends the job, Slurm, Ctrl-C and a terminal that closes. They may reach every process of a run."""
STOPPED_EARLY = 85
"""Exit status after one of them: the run is saved and is to be started again."""


@contextmanager
def stop_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Each of STOP_SIGNALS (of Ctrl-C, the first) asks for a stop after the current update.

    A SIGHUP that is ignored at the start, as under `nohup`, stays ignored.
    """

    def received(number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        handle(number)

    stays_ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, received) for number in STOP_SIGNALS if number not in stays_ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
