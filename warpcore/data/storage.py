"""The storage seam: everything Warpcore does with the places that hold tars goes through these few calls.

A scheme is one class with these methods and one entry in `_STORAGES`; nothing else in the project knows about schemes.
"""

import contextlib
import difflib
import errno
import glob
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from warpcore.data.globs import matching
from warpcore.data.storage_protocol import (
    COMPRESSED_ENDINGS,
    TAR_ENDINGS,
    ChangedShardError,
    LostShardError,
    ReadFaultError,
    Storage,
    Version,
)
from warpcore.errors import UserError
from warpcore.files import naming, open_to_read

T = TypeVar("T")
READ_ATTEMPTS = 3
"""An I/O fault is tried again this often, with a growing pause, before it stops the run."""
PARALLEL_CALLS = 32


class LocalStorage:
    """Files of this machine. URLs are absolute paths."""

    def tars(self, folder: str) -> list[tuple[str, int, str]]:
        return sorted(self._walk(folder))

    def _walk(self, folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int, str]]:
        here = os.path.realpath(folder)
        if here in above:  # a link to a folder that holds it
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    yield from self._walk(entry.path, (*above, here))
                elif entry.name.endswith(TAR_ENDINGS):
                    yield entry.path, *_stat_of_tar(entry.path)

    def glob(self, pattern: str) -> list[tuple[str, int, str]]:
        if "**" in pattern.split("/"):  # where links lead in circles, `glob` would go round them
            folders = filter(os.path.isdir, glob.glob(pattern.partition("/**")[0] or "/"))
            found = {path: (path, *version) for folder in folders for path, *version in self._walk(folder)}
            return sorted(found[path] for path in matching(found, pattern))
        paths = sorted(path for path in glob.glob(pattern) if not os.path.isdir(path))
        return [(path, *_stat_of_tar(path)) for path in paths if path.endswith(TAR_ENDINGS)]

    def is_folder(self, url: str) -> bool:
        return os.path.isdir(url)

    def stat(self, url: str) -> tuple[int, str]:
        return _size_and_etag(os.stat(url))

    def stats(self, urls: Sequence[str]) -> dict[str, tuple[int, str]]:
        found = {}
        for url in urls:
            try:
                found[url] = self.stat(url)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                    raise
        return found

    def near(self, url: str) -> list[str]:
        folder, name = os.path.split(url)
        while folder and not os.path.isdir(folder):  # the folder itself may be what is misspelt
            folder, name = os.path.split(folder)
        names = sorted(os.listdir(folder or "."))
        return [os.path.join(folder, near) for near in difflib.get_close_matches(name, names, n=3, cutoff=0.5)]

    def open(self, url: str) -> BinaryIO:
        return open_to_read(url)

    def write(self, url: str, content: bytes) -> None:
        aside = os.path.join(os.path.dirname(url), f".{os.path.basename(url)[-100:]}.{os.getpid()}.part")
        try:
            os.makedirs(os.path.dirname(url), exist_ok=True)
            with naming(aside), open(aside, "wb") as file:
                file.write(content)
            os.replace(aside, url)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            if error.errno in (errno.EROFS, errno.EPERM):
                raise PermissionError(*error.args) from error
            raise

    def read_ranges(self, url: str, ranges: list[tuple[int, int]], version: Version | None = None) -> list[bytes]:
        with open_to_read(url, buffering=0) as file:
            number = file.fileno()
            if version is not None and _size_and_etag(os.fstat(number)) != tuple(version):
                raise ChangedShardError(url)
            return [_read_exactly(number, url, offset, size) for offset, size in ranges]


def _stat_of_tar(path: str) -> Version:
    try:
        return _size_and_etag(os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        if path.endswith(COMPRESSED_ENDINGS):  # it is left out in any case
            return 0, ""
        raise UserError(f"{path} is a link that leads nowhere; restore what it leads to, or remove it") from None


def _size_and_etag(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, f"mtime-{status.st_mtime_ns}"


def _read_exactly(file: int, url: str, offset: int, size: int) -> bytes:
    pieces, missing = [], size
    while missing:
        piece = os.pread(file, missing, offset + size - missing)
        if not piece:
            raise ChangedShardError(url)
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _s3() -> Storage:
    from warpcore.data.s3 import S3Storage  # boto3 takes a second to import

    return S3Storage()


_STORAGES: dict[str, Callable[[], Storage]] = {"file": LocalStorage, "s3": _s3}


def complete_url(path: str) -> str:
    """The one spelling of a path or URL: an absolute path for local files, `scheme://...` for others."""
    if is_remote(path):
        return path
    if path.startswith("file:"):
        parts = urlsplit(path)
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{path!r}: a file: URL has three slashes, such as file:///data/shards")
        path = unquote(parts.path)
    return os.path.abspath(os.path.expanduser(path))


def storage_for(url: str) -> Storage:
    """The storage that reads this URL. Raises UserError for a scheme that there is none for."""
    scheme = _scheme(url)
    if scheme not in _STORAGES:
        raise UserError(f"{url!r}: can't read {scheme}: URLs; use a path, a file: URL or s3://bucket/folder")
    return _STORAGES[scheme]()


def is_remote(url: str) -> bool:
    """Whether a request to the URL's place takes a while, however little is asked for."""
    return _scheme(url) != "file"


def expand_home(path: str) -> str:
    """The path with the home folder for `~` or `~user` at its beginning.

    Raises:
        UserError: there is no such user, or what it names lies in a folder that is called `~`.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise UserError(f"{path}: {path.split('/')[0]} is no user of this machine; write the path in full")
    if os.path.exists(path) and not os.path.exists(expanded):
        raise UserError(in_folder_named_tilde(path, expanded))
    return expanded


def in_folder_named_tilde(path: str, expanded: str) -> str:
    """The message about files that an earlier version, which did not expand `~`, wrote to a folder of that name."""
    command = (
        f"mkdir -p {shlex.quote(os.path.dirname(expanded))} && mv {shlex.quote('./' + path)} {shlex.quote(expanded)}"
    )
    return (
        f"{expanded} is not there, but {os.path.abspath(path)} is, in a folder that is called ~, which an earlier "
        f"version made. To go on with what it holds: {command}"
    )


def local_path(path: str | Path) -> Path:
    """A path of this machine, with `~` expanded.

    Raises:
        UserError: it is a URL, which as a path would be a folder called `s3:`, or as `expand_home`.
    """
    if re.match(r"\w[\w+.-]+:/", str(path)):
        problem = f"{path} is a URL, but a path of this machine is needed"
        if str(path).startswith("s3:"):
            problem += (
                "; only webdataset_path, validation_path, prior_path and checkpoint_path may be on S3. Copy it here "
                f"first (a run with aws s3 cp --recursive --exclude 'state/*' {path} FOLDER), or copy there afterwards"
            )
        raise UserError(problem)
    return Path(expand_home(str(path)))


def read_small(url: str, most_bytes: int) -> bytes:
    """The content of a file that people write, such as a config or a list of tars.

    Raises:
        FileNotFoundError: there is none.
        UserError: it has more than `most_bytes`, of which no more are read.
    """
    with storage_for(url).open(url) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"{url} has more than {most_bytes >> 20} MiB")
    return content


def real_url(url: str) -> str:
    """The same for two URLs that lead to one file."""
    return url if is_remote(url) else os.path.realpath(url)


def read_ranges(url: str, ranges: list[tuple[int, int]], version: Version | None = None) -> list[bytes]:
    """The bytes of every (offset, size) of a tar: the only way that picture bytes are read.

    Raises:
        ReadFaultError: the read failed READ_ATTEMPTS times.
        LostShardError: the tar is gone.
        ChangedShardError: the tar is not of this version, or ends before a range does.
    """
    with reading(url):
        return patiently(lambda: storage_for(url).read_ranges(url, ranges, version))


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """What keeps a tar from being read, though it was there before, becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise LostShardError(url) from None
    except OSError as error:
        raise ReadFaultError(url, error.strerror or str(error)) from error


def in_parallel(function: Callable[..., T], arguments: Sequence[tuple]) -> Iterator[T]:
    """The results of the calls with each of the arguments, in order, several calls at a time.

    For calls that wait for storage: places that take long to answer answer many at once.
    """
    if len(arguments) < 2:
        yield from (function(*one) for one in arguments)
        return
    pool = ThreadPoolExecutor(min(len(arguments), PARALLEL_CALLS))
    try:
        yield from pool.map(function, *zip(*arguments, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns; an I/O fault is tried again."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            if attempt + 1 == READ_ATTEMPTS:
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _scheme(path: str) -> str:
    head, separator, _ = path.partition(":")
    is_scheme = separator and head.isalnum() and len(head) > 1 and not Path(path).exists()
    return head.lower() if is_scheme else "file"
