"""Bounds for hostile input: processor time, time on the clock, memory, and the one folder that may be written to."""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings

WRITING_FLAGS = 3  # os.O_WRONLY | os.O_RDWR
EVENTS_OF_ONE_PATH = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
EVENTS_OF_TWO_PATHS = {"os.rename", "os.link", "os.symlink"}

FUZZ = int(os.environ.get("FUZZ", 1))


def fuzz(examples: int) -> settings:
    """Settings of a test of hostile input: the same inputs each time, or with FUZZ=100 in the environment others, 100
    times as many."""
    return settings(
        max_examples=examples * FUZZ, derandomize=FUZZ == 1, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def bounded(folder: Path, seconds: float = 5, gibibytes: float = 1) -> Iterator[None]:
    """What runs inside fails when it uses more than `seconds` of processor time, hangs six times as long, wants
    `gibibytes` more memory than is held now (the allocation fails), or changes a file outside `folder`.
    Main thread only; not for code that starts processes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {one: signal.signal(one, _too_slow) for one in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + int(gibibytes * 2**30), before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    written: list[str] = []
    _watch(written, folder.resolve())
    try:
        yield
    finally:
        _watchers.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert not written, f"written outside {folder}: {written}"


class TooSlow(BaseException):
    """Not an `Exception`: no code under test may take it for a fault of a file."""


def _too_slow(number, frame):
    raise TooSlow(f"{signal.Signals(number).name}: still in {frame.f_code.co_filename}:{frame.f_lineno}")


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()


_watchers: list[tuple[list[str], Path]] = []


def _watch(written: list[str], folder: Path) -> None:
    if not _hooked:
        sys.addaudithook(_note)  # can't be removed again: it does nothing while nobody watches
        _hooked.append(True)
    _watchers.append((written, folder))


_hooked: list[bool] = []


def _in_folder(path, *arguments):
    """The path of an event; `shutil.rmtree` names files in an opened folder, whose number comes last."""
    opened = arguments[-1] if arguments else -1
    relative = isinstance(path, str) and not path.startswith("/") and isinstance(opened, int) and opened >= 0
    return Path(f"/proc/self/fd/{opened}") / path if relative else path


def _note(event: str, arguments: tuple) -> None:
    if not _watchers:
        return
    if event == "open":
        path, _, flags = arguments
        paths = [path] if isinstance(flags, int) and flags & WRITING_FLAGS else []
    elif event in EVENTS_OF_ONE_PATH:
        paths = [_in_folder(*arguments)]
    elif event in EVENTS_OF_TWO_PATHS:
        paths = [arguments[1]]
    else:
        return
    for path in paths:
        if isinstance(path, bytes):
            path = path.decode(errors="surrogateescape")
        if isinstance(path, str | Path) and not str(path).startswith("/dev/") and "__pycache__" not in str(path):
            # Only opening a file follows a link that stands at its path; the others change the link itself.
            real = Path(path).resolve() if event == "open" else Path(path).parent.resolve() / Path(path).name
            for written, folder in _watchers:
                if not real.is_relative_to(folder):
                    written.append(f"{event} {path}")
