"""The other processes of a run, when one of them ends with an error: it is told once, though all of them meet it.

They agree at the place where they met. Processes that fail before that, as over a mistake in the config, meet there
to tell it.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from warpcore.errors import UserError, print_error
from warpcore.processes import meet_others

MEETING_SECONDS = 30
"""Processes that fail before they met wait this long for the others."""
WAIT_SECONDS = 3
"""Within this time after the first process, the others fail too, or notice that it is gone."""
_ERROR, _NUM_FAILED = "error", "num_failed"
Answer = TypeVar("Answer")


def tell_once(message: str) -> None:
    """Print an error message, but where another process of the run on this machine has printed it already."""
    others = _within(MEETING_SECONDS, lambda: meet_others(timedelta(seconds=MEETING_SECONDS)))
    if others is None:
        print_error(message)
        return
    store, rank, count = others
    own = f"{rank} {socket.gethostname()} {message.encode(errors='backslashreplace').decode()}"
    first = _within(WAIT_SECONDS, lambda: store.compare_set(_ERROR, "", own).decode())
    if first is None or first == own or not _is_told(message, first):
        print_error(message)
    if first is not None:
        _within(WAIT_SECONDS, lambda: _wait_for_others(store, rank, count))


@contextmanager
def explained() -> Iterator[None]:
    """A fault of the connection between processes becomes the UserError that has ended another one, where one has.

    Elsewhere a note is added to it of what it usually means.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        told = _told_by_another()
        if told is not None:
            raise UserError(told) from error
        error.add_note(
            "Another process of the run ended, or gave no answer within process_timeout_seconds: its own output, or "
            "that of its machine, says why"
        )
        raise


def _is_told(message: str, first: str) -> bool:
    """Whether what the first process told says the same: some add which process it was."""
    _, host, told = first.split(" ", 2)
    return host == socket.gethostname() and (told in message or message in told)


def _told_by_another() -> str | None:
    others = meet_others()
    if others is None:
        return None
    store = others[0]

    def told() -> str:
        store.wait([_ERROR], timedelta(seconds=WAIT_SECONDS))
        return store.get(_ERROR).decode().split(" ", 2)[2]

    return _within(WAIT_SECONDS + 1, told)


def _wait_for_others(store: dist.Store, rank: int, count: int) -> None:
    """The main process holds the place where they met: the others ask there before it ends."""
    failed, deadline = store.add(_NUM_FAILED, 1), time.monotonic() + WAIT_SECONDS
    while rank == 0 and failed < count and time.monotonic() < deadline:
        time.sleep(0.05)
        failed = store.add(_NUM_FAILED, 0)


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """What the other processes answer, or None: they may be gone, or never come."""
    answers: list[Answer] = []

    def asking() -> None:
        try:
            answers.append(ask())
        except (RuntimeError, UserError):  # the error that is to be told matters, not that nobody can be asked
            return

    thread = threading.Thread(target=asking, daemon=True)  # of a process that is stopped no answer comes, ever
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
