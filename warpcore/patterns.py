"""Regular expressions that a config or a file brings along: valid, short, and stopped where they would go on for ever.

Python's `re` has no limit of its own, and `(a+)+$` on a name of 40 letters takes years.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from warpcore.errors import UserError

MAX_LENGTH = 1000
MAX_SECONDS = 5.0
"""Of processor time. Names of all parameters of a network are searched in milliseconds."""


def valid_pattern(pattern: str) -> str:
    """The regular expression. Raises ValueError where it is none, or has more than MAX_LENGTH characters."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a regular expression has at most {MAX_LENGTH} characters, not {len(pattern)}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return pattern


@contextmanager
def searching(what: str, seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Regular expressions are searched for in here, in the main thread.

    what: where they are from, for the message.

    Raises:
        UserError: they took more than `seconds` of processor time.
    """

    def stop(*_: object) -> None:
        raise UserError(
            f"{what}: a regular expression takes longer than {seconds:g} s. Repetitions inside of a repetition, such "
            "as (a+)+, try every way to divide a name: write it with one"
        )

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
