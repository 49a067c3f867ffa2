"""The headers of a tar: names and places of its members, in the forms that GNU tar, bsdtar and Python write.

Python's `tarfile` follows sizes below zero and unbounded chains of headers; this follows neither, and is faster.
Formats: POSIX.1-1988 (ustar) and -2001 (pax), GNU's long names and base-256 numbers.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = 512
MAX_EXTENDED_BYTES = 1 << 20
"""Of one header that holds a long name or pax records."""
MAX_EXTENDED_HEADERS = 16
"""Before one member."""
MAX_BYTES = 1 << 60
"""Of a member; larger sizes are damage."""
ENCODING = ("utf-8", "surrogateescape")

_REGULAR, _LINKS = b"0\x007", b"12"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _GNU_SPARSE = b"L", b"K", b"xX", b"g", b"S"
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and pipes: a size that their header gives takes no room in the tar."""
_BLANK_CHECKSUM = sum(b" " * 8)


class TarHeaderError(Exception):
    """No valid header at a byte of the tar. `cut` where the file ends inside of it."""

    def __init__(self, offset: int, reason: str, cut: bool = False):
        super().__init__(f"no valid header at byte {offset}: {reason}")
        self.offset, self.cut = offset, cut


class Member(NamedTuple):
    """A regular file, or a hard or symbolic link, of a tar."""

    name: str
    offset: int
    """Of its content, in bytes."""
    size: int
    is_link: bool
    is_sparse: bool


def read_members(file: BinaryIO, start: int = 0) -> Iterator[Member]:
    """The members of an open tar, up to the mark of its end; then `file` stands behind that mark's first block.

    start: the byte of the header to begin with.

    Raises:
        TarHeaderError: a header is invalid, cut short, or longer than names reasonably are.
    """
    offset, for_all = start, {}
    told: dict[str, str] = {}  # of the next member, from the headers before it
    num_extended = 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK_BYTES)
        if not block.strip(b"\0") and len(block) == BLOCK_BYTES:
            if told:
                raise TarHeaderError(offset, "a long name belongs to no member")
            return
        kind, size = _check(block, offset)
        content = offset + BLOCK_BYTES
        if kind in b"LKxXg":
            num_extended += 1
            if num_extended > MAX_EXTENDED_HEADERS or size > MAX_EXTENDED_BYTES:
                raise TarHeaderError(offset, f"its names take more than {MAX_EXTENDED_BYTES} bytes, or many headers")
            text = file.read(size)
            if len(text) < size:
                raise TarHeaderError(offset, "the file ends inside of it", cut=True)
            if kind in _LONG_NAME:
                told.setdefault("path", text.partition(b"\0")[0].decode(*ENCODING))
            elif kind in _PAX:
                told = _pax_records(text, offset) | told  # what stands further out counts, as for tarfile
            elif kind in _PAX_GLOBAL:
                for_all |= _pax_records(text, offset)
            offset = content + padded(size)
            continue
        about = for_all | told if for_all else told
        name = about.get("path")
        name = _name(block) if name is None else name
        if "size" in about:
            size = _decimal(about["size"], offset)
        if kind == b"\0" and name.endswith("/"):  # how tars of 1979 mark a folder
            kind = b"5"
        is_sparse = kind in _GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in about)
        if kind in _REGULAR or kind in _LINKS or is_sparse:
            yield Member(name, content, size, kind in _LINKS, is_sparse)
        offset = content + (0 if kind in _WITHOUT_DATA else padded(size))
        if told:
            told = {}
        num_extended = 0


def check_header(block: bytes) -> None:
    """Raises TarHeaderError where the first block of a file is no header of a tar."""
    _check(block, 0)


def _check(block: bytes, offset: int) -> tuple[bytes, int]:
    """The kind of member and the size that a header gives."""
    if len(block) < BLOCK_BYTES:
        raise TarHeaderError(offset, "the file ends here", cut=True)
    found = sum(block) - sum(block[148:156]) + _BLANK_CHECKSUM
    stated = _number(block[148:156], offset)
    if stated != found:
        # Some old programs add up signed characters.
        signed = found - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if stated != signed:
            raise TarHeaderError(offset, "its checksum is wrong")
    return block[156:157], _number(block[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """Octal digits, or for large numbers base 256 behind a byte of 128."""
    value = None
    if field[0] == 128:
        value = int.from_bytes(field[1:], "big")
    elif not (digits := field.partition(b"\0")[0].strip()) or (digits.isdigit() and not set(digits) & set(b"89")):
        value = int(digits or b"0", 8)
    if value is None or value > MAX_BYTES:
        raise TarHeaderError(offset, "a number in it is invalid")
    return value


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(*ENCODING)


def _pax_records(text: bytes, offset: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records, start = {}, 0
    while start < len(text) and text[start] != 0:
        digits, space, _ = text[start : start + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise TarHeaderError(offset, "its pax records are invalid")
        end = start + int(digits)
        key, equals, value = text[start + len(digits) + 1 : end - 1].partition(b"=")
        if end > len(text) or text[end - 1 : end] != b"\n" or not equals or not key:
            raise TarHeaderError(offset, "its pax records are invalid")
        records[key.decode(*ENCODING)] = value.decode(*ENCODING)
        start = end
    return records


def _decimal(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_BYTES):
        raise TarHeaderError(offset, "its size is not a number of bytes")
    return int(text)


def padded(size: int) -> int:
    """How much room content of this size takes, in whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
