"""What a place that holds tars can do, and how it fails. `warpcore.data.storage` has those places by scheme."""

from collections.abc import Sequence
from typing import BinaryIO, Protocol

from warpcore.errors import UserError

Version = tuple[int, str]
"""Size in bytes and etag of a tar: when its content changes, so does this."""
COMPRESSED_ENDINGS = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.zstd", ".tar.lz4",
    ".tar.lz", ".tar.lzma", ".tar.Z",
)  # fmt: skip
TAR_ENDINGS = (".tar", *COMPRESSED_ENDINGS)


class ChangedShardError(UserError):
    """The tar is not the one any more that the run was planned with."""

    def __init__(self, url: str):
        super().__init__(
            f"{url} changed while it was in use. Restore it, or start again: the run then stops at the difference, "
            "unless on_data_change: new_epoch accepts it"
        )
        self.url = url

    def __reduce__(self):
        return ChangedShardError, (self.url,)


class LostShardError(UserError, FileNotFoundError):
    """A tar is gone that was there when the run began."""

    def __init__(self, url: str):
        super().__init__(f"{url} is gone: it was deleted or moved while it was in use. Put it back, and start again")
        self.url = url

    def __reduce__(self):
        return LostShardError, (self.url,)


class StorageError(UserError):
    """The place that holds the data can't be reached, or refuses. It was tried often enough."""


class ReadFaultError(StorageError, OSError):
    """A tar can't be read though it is there. It was tried often enough."""

    def __init__(self, url: str, reason: str):
        super().__init__(
            f"{url} can't be read ({reason}): look after its disk or mount, and start the same command again"
        )
        self.url, self.reason = url, reason

    def __reduce__(self):
        return ReadFaultError, (self.url, self.reason)


class Storage(Protocol):
    """What a place that holds tars can do. A URL here is complete; `etag` changes when the content does."""

    def tars(self, folder: str) -> list[tuple[str, int, str]]:
        """(URL, size in bytes, etag) of every tar below the folder, sorted by URL; also of compressed ones."""

    def glob(self, pattern: str) -> list[tuple[str, int, str]]:
        """The same for those that match `*`, `?`, `[...]` and `**`."""

    def is_folder(self, url: str) -> bool: ...

    def stat(self, url: str) -> tuple[int, str]:
        """Size in bytes and etag. Raises FileNotFoundError."""

    def stats(self, urls: Sequence[str]) -> dict[str, tuple[int, str]]:
        """The same of many URLs, by URL; those that don't exist are left out."""

    def near(self, url: str) -> list[str]:
        """Names beside `url` that resemble it, for error messages."""

    def open(self, url: str) -> BinaryIO:
        """A seekable file, for indexing and for reading indexes. Raises FileNotFoundError."""

    def write(self, url: str, content: bytes) -> None:
        """Replace a small file as a whole: a reader sees the old or the new one. Raises PermissionError.

        Makes the folder, if need be.
        """

    def read_ranges(self, url: str, ranges: list[tuple[int, int]], version: Version | None = None) -> list[bytes]:
        """The bytes of every (offset, size). Raises OSError, ChangedShardError where the tar is of another version."""
