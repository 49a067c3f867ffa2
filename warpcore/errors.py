"""The one kind of error that is the user's to fix: scripts print its message without a traceback and exit with 2."""

import errno
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from warpcore.quiet import ignore_expected_warnings
from warpcore.redaction import redact, redact_output

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""A folder in the place of a file, a file in that of a folder, or a name that no file can have."""


class UserError(ValueError):
    """Says what is wrong, where, and what to write instead, without credentials."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(UserError):
    """A mistake in a configuration: the message names the key, what was found and what to write."""


def print_error(message: str) -> None:
    """As every script tells of an error that is the user's to fix."""
    # One write: lines of several processes into one file stay whole, even where PYTHONUNBUFFERED is set.
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()


def run_script(main: Callable[[], int | None], tell: Callable[[str], None] = print_error) -> None:
    """Run a script's `main` and exit with its status; see `clear_errors`."""
    with clear_errors(tell):
        raise SystemExit(main())


@contextmanager
def clear_errors(tell: Callable[[str], None] = print_error) -> Iterator[None]:
    """A `UserError`, a full disk, or a path that can't be used becomes one clear message and exit status 2; Ctrl-C one
    line and the status that shells give it, 130.

    tell: what prints the message; of a script that runs in several processes `warpcore.peers.tell_once`.
    """
    redact_output()
    ignore_expected_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter of a caption is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        tell(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        if (problem := _explained(error)) is None:
            raise
        tell(redact(problem))
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # not by `tell`, which may wait for other processes
        sys.stderr.write("stopped by Ctrl-C\n")
        raise SystemExit(128 + signal.SIGINT) from None


def _explained(error: OSError) -> str | None:
    """What is wrong, and what to do about it, where that is the user's to fix."""
    path, reason = error.filename, error.strerror
    if error.errno in _FULL:
        disk = "a disk" if path is None else f"the disk that holds {path}"
        return f"{disk} is full ({reason}). Make room there and start the same command again"
    if error.errno == errno.EFBIG:
        return f"{path or 'a file'} would be larger than a file may be here ({reason}): raise the limit (ulimit -f)"
    if error.errno in _FORBIDDEN and path is not None:
        return f"{path} may not be read or written ({reason}): change its permissions, or name another place"
    if error.errno in _IN_THE_WAY and path is not None:
        return f"{path} can't be used ({reason}): name another path"
    return None
