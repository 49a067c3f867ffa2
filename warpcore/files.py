"""Files in a run's folder, which others may be able to write to: no link that was put there is written through."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from warpcore.errors import UserError


def open_plain(path: Path, mode: str) -> IO:
    """`path.open(mode)`, for a file that is no link.

    Raises:
        UserError: it is a link.
    """
    try:
        encoding = None if "b" in mode else "utf-8"
        return open(path, mode, encoding=encoding, opener=_open_no_link)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _refusal(path) from None


@contextmanager
def writing(path: Path, mode: str) -> Iterator[IO]:
    """`open_plain` for a `with` statement, whose errors name the file."""
    with naming(path), open_plain(path, mode) as file:
        yield file


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Errors inside that name no file, as those of a full disk do not, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _open_no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def refuse_links(*paths: Path) -> None:
    """Raise UserError where one of the paths (files or folders, there or not) is a link."""
    for path in paths:
        if path.is_symlink():
            raise _refusal(path)


def _refusal(path: Path) -> UserError:
    return UserError(
        f"{path} is a link, and inside its folder a run writes through none: remove it (checkpoint_path may be a link)"
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is on the disk, whole, before anything that depends on it."""
    partial = path.with_name(path.name + ".partial")
    with writing(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
