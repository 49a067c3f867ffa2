"""Files that others may have put there.

What is read has to be a regular file: a pipe would be waited for, and a device may have no end. In a run's folder, no
link is written through.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from warpcore.errors import UserError


class NotAFileError(UserError):
    """There is no regular file at a path, but a folder, a pipe, a socket or a device."""


_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def why_no_file(path: Path | str) -> str | None:
    """Why a path leads to no regular file, such as "does not exist" or "is a folder"; None where it leads to one."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a link that leads nowhere" if os.path.islink(path) else "does not exist"
    except PermissionError as error:
        return f"cannot be looked at ({error.strerror})"
    except (OSError, ValueError) as error:  # a name that is too long, links in a circle, a zero byte
        return f"does not exist ({getattr(error, 'strerror', error)})"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "is not a file")


def open_to_read(path: Path | str, buffering: int = -1) -> BinaryIO:
    """`open(path, "rb")`, for a regular file, or a link to one.

    Raises:
        FileNotFoundError: there is nothing.
        NotAFileError: there is something else.
    """
    return open(path, "rb", buffering=buffering, opener=_open_regular)


def read_bytes(path: Path | str) -> bytes:
    """The content of a regular file. Raises as `open_to_read`."""
    with open_to_read(path) as file:
        return file.read()


def require_file(path: Path | str) -> None:
    """For libraries that open a path themselves. Raises as `open_to_read`."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise _not_a_file(path, mode)


def _open_regular(name: str, flags: int) -> int:
    require_file(name)  # first: opening a device may move it
    file = os.open(name, flags | os.O_NONBLOCK)  # a pipe that took the file's place since then isn't waited for
    if stat.S_ISREG(mode := os.fstat(file).st_mode):
        return file
    os.close(file)
    raise _not_a_file(name, mode)


def _not_a_file(path: Path | str, mode: int) -> NotAFileError:
    return NotAFileError(f"{path} {_KINDS.get(stat.S_IFMT(mode), 'is not a file')}; a regular file is needed")


def open_plain(path: Path, mode: str) -> IO:
    """`path.open(mode)`, for a regular file, or a new one, that is no link.

    Raises:
        UserError: it is a link, or no file.
    """
    try:
        encoding = None if "b" in mode else "utf-8"
        return open(path, mode, encoding=encoding, opener=_open_no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refusal(path) from None
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody reads
            raise _not_a_file(path, path.stat().st_mode) from None
        raise


def open_to_change(path: Path, buffering: int = -1) -> IO:
    """A file, which is created where there is none, to be read and written in place.

    Raises:
        UserError: it is a link, or no file.
    """
    return open(path, "r+b", buffering, opener=lambda name, flags: _open_no_link(name, flags | os.O_CREAT))


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


def disk_error(error: BaseException) -> BaseException:
    """What really went wrong where PyTorch closes a file of which the disk refused a part: closing it fails, too, and
    does not say why."""
    first = error.__context__
    return first if isinstance(error, RuntimeError) and isinstance(first, OSError) else error


def _open_no_link(name: str, flags: int) -> int:
    file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(mode := os.fstat(file).st_mode):
        return file
    os.close(file)
    raise _not_a_file(name, mode)


def refuse_links(*paths: Path) -> None:
    """Raise UserError where one of the paths (files or folders, there or not) is a link."""
    for path in paths:
        if path.is_symlink():
            raise _refusal(path)


def _refusal(path: Path) -> UserError:
    return UserError(
        f"{path} is a link, and inside its folder a run writes through none: remove it (checkpoint_path may be a link)"
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is on the disk, whole, before anything that depends on it."""
    partial = path.with_name(path.name + ".partial")
    with replacing(path, partial), writing(partial, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, partial: Path) -> Iterator[None]:
    """What is written to `partial` inside takes the place of `path`. Where the disk refuses it, it goes, with the room
    that it took."""
    try:
        yield
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
