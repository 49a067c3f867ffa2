"""The one kind of error that is the user's to fix: scripts print its message without a traceback and exit with 2."""

import errno
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from warpcore.redaction import redact, redact_output


class UserError(ValueError):
    """Says what is wrong, where, and what to write instead, without credentials."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(UserError):
    """A mistake in a configuration: the message names the key, what was found and what to write."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status; see `clear_errors`."""
    with clear_errors():
        raise SystemExit(main())


@contextmanager
def clear_errors() -> Iterator[None]:
    """A `UserError`, or a full disk, becomes one clear message and exit status 2."""
    redact_output()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter of a caption is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        disk = f"the disk that holds {error.filename}" if error.filename is not None else "a disk"
        print(
            f"error: {disk} is full ({error.strerror}). Make room there and start the same command again",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
