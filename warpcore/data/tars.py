"""What a tar holds: the samples, and where the bytes of their members are. From its headers alone."""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from warpcore.data.tar_headers import BLOCK_BYTES, TarHeaderError, check_header, read_members
from warpcore.errors import UserError

logger = logging.getLogger(__name__)

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# webdataset's rule: the key is the path up to the first dot of the file's name; hidden files are no samples.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class BadShardError(UserError):
    """The tar can't be used as it is; the message names it, what is wrong and what to do."""


class CutShardError(BadShardError):
    """The tar ends before it should. `samples` are those before that, the last one perhaps not whole."""

    def __init__(self, message: str, samples: "list[TarSample]"):
        super().__init__(message)
        self.samples = samples


SHARED_KEY = "two samples share a key"
"""The start of the problem of a row whose members can't be told from those of another one."""


@dataclass(slots=True)
class TarSample:
    """The members of one key: extension (lower case, no leading dot) -> (offset, size) in the tar."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    """Extensions of members that are hard or symbolic links: their content is not under their name."""
    seen: dict[str, Any] = field(default_factory=dict)
    """What `look` made of the members, by extension."""
    problem: str | None = None
    """Why it can't be used, whatever its members are."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Extensions as the tar has them, of those that are not in lower case."""
    replaced: list[str] = field(default_factory=list)
    """Names of members that stand in the tar more than once."""
    renumbered: bool = False
    """Whether indexes of version 2 made other rows of its members."""

    def add(self, extension: str, spelled: str, span: tuple[int, int] | None) -> None:
        """Add a member, or put it in the place of the one of its name; a link has no span."""
        self.members.pop(extension, None)
        self.seen.pop(extension, None)
        if extension in self.links:
            self.links.remove(extension)
        if spelled != extension:
            self.spelled[extension] = spelled
        if span is None:
            self.links.append(extension)
        else:
            self.members[extension] = span

    def has(self, extension: str) -> bool:
        return extension in self.members or extension in self.links


def read_samples(
    file: BinaryIO,
    url: str,
    size_bytes: int,
    look: Callable[[str, int, int], Any] | None = None,
    content_hash: Any = None,
) -> list[TarSample]:
    """The samples of an open tar, in the order in which their keys first appear.

    Which members belong together:
      * Members of one key belong together wherever they stand: a tar made without --sort=name has them scattered.
      * Of a name that repeats, the last one counts, as for `tar -x`; `./a.txt`, `/a.txt` and `a.txt` are one name.
      * Names that differ only in the case of their extension, such as `a.jpg` and `a.JPG`, are of two samples with
        the key `a`. What else has that key may be of either, so both are refused: their `problem` names the two.

    `look` is called with extension, offset and size of every member on the way, so that one pass does for all;
    `content_hash` is updated with name, offset and size of each.

    Raises:
        BadShardError: not a tar, compressed, sparse, damaged, or several tars in one file.
        CutShardError: it is cut short.
    """
    samples: list[TarSample] = []
    of_key: dict[str, list[TarSample]] = {}
    folder_links = []
    for name, offset, size in _members(file, url, size_bytes, samples):
        if content_hash is not None:
            content_hash.update(f"{name}\0{offset}\0{size}\0".encode(errors="surrogateescape"))
        match = _KEY_AND_EXTENSION.fullmatch(name)
        if not match or re.fullmatch(r"__[^/]*__", match[1]):
            if offset is None and "." not in name.rpartition("/")[2]:
                folder_links.append(name)
            continue
        key, spelled = match[1], match[2]
        extension = spelled.lower()
        same_key = of_key.setdefault(posixpath.normpath(key).lstrip("/"), [])
        sample = _sample_for(key, extension, spelled, same_key, samples)
        sample.add(extension, spelled, None if offset is None else (offset, size))
        if offset is not None:
            sample.seen[extension] = look and look(extension, offset, size)
    if folder_links:
        logger.warning(
            "%s: what links lead to is not in the tar (%d: %s); build it with tar --dereference",
            url, len(folder_links), ", ".join(folder_links[:3]),
        )  # fmt: skip
    return samples


def _sample_for(
    key: str, extension: str, spelled: str, same_key: list[TarSample], samples: list[TarSample]
) -> TarSample:
    """The sample that a member belongs to; a new one is added to `same_key` and `samples`."""
    for sample in same_key:
        if not sample.has(extension):
            sample.renumbered |= key != sample.key
            return sample
        if sample.spelled.get(extension, extension) == spelled:
            sample.renumbered = True
            sample.replaced.append(f"{key}.{spelled}")
            return sample
    new = TarSample(key)
    if same_key:
        other = same_key[0].spelled.get(extension, extension)
        for sample in (*same_key, new):
            sample.problem = f"{SHARED_KEY}: {key}.{other} and {key}.{spelled}"
            sample.renumbered = True
    same_key.append(new)
    samples.append(new)
    return new


def clean(text: str) -> str:
    """Text that parquet can hold: file names and escapes in .json may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _members(
    file: BinaryIO, url: str, size_bytes: int, samples: list[TarSample]
) -> Iterator[tuple[str, int | None, int]]:
    """(name, offset, size) of every regular file, no offset for links; the end of the archive is checked."""
    _check_start(file, url, size_bytes)
    try:
        for member in read_members(file):
            if member.is_sparse:
                raise BadShardError(f"{url}: {member.name} is stored sparsely; build the tar without --sparse")
            end = member.offset + member.size
            if end > size_bytes and not member.is_link:
                raise _truncated(url, f"{member.name} should end at byte {end}", size_bytes, samples)
            yield clean(member.name), None if member.is_link else member.offset, 0 if member.is_link else member.size
        _check_end(file, url)
    except TarHeaderError as error:
        if error.cut:
            what = "the mark of its end is missing" if error.offset >= size_bytes else str(error)
            raise _truncated(url, what, size_bytes, samples) from None
        raise BadShardError(
            f"{url} is damaged: {error} of {size_bytes}, after {_count(samples)}. {_REBUILD}"
        ) from None


def _check_start(file: BinaryIO, url: str, size_bytes: int) -> None:
    if size_bytes == 0:
        raise BadShardError(f"{url} is an empty file, not a tar")
    start = file.read(BLOCK_BYTES)
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise BadShardError(f"{url} is compressed with {name}, so its samples can't be read singly; decompress it")
    if start != bytes(BLOCK_BYTES):
        try:
            check_header(start)
        except TarHeaderError as error:
            raise BadShardError(f"{url} is not a tar: {error}") from None


def _check_end(file: BinaryIO, url: str) -> None:
    """A whole tar ends with blocks of zeros; where anything else follows, samples are hidden."""
    end = file.tell() - BLOCK_BYTES
    while piece := file.read(1 << 20):
        if piece.count(0) != len(piece):
            raise BadShardError(
                f"{url} goes on after its end at byte {end}: joined tars hide samples; give each its own file"
            )


def _truncated(url: str, what: str, size_bytes: int, samples: list[TarSample]) -> CutShardError:
    return CutShardError(
        f"{url} is cut short: {what}, but the file has {size_bytes} bytes; {_count(samples)} before that are whole. "
        f"{_REBUILD}",
        samples,
    )


_REBUILD = (
    "Copy the tar again, or rebuild it: unpack what can be read (tar -xf NAME.tar -C FOLDER) and run "
    "tools/build_dataset.py FOLDER OUT."
)


def _count(samples: list[TarSample]) -> str:
    number = len(whole_ones(samples))
    return f"{number} sample{'' if number == 1 else 's'}"


def whole_ones(samples: list[TarSample]) -> list[TarSample]:
    """Those that have every kind of member that the first one has."""
    return [sample for sample in samples if samples[0].members.keys() <= sample.members.keys()]
