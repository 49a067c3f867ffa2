"""Text that people write (prompts, configs, captions): UTF-8, with or without a byte order mark, or UTF-16; and text
that they read."""

import codecs
import re
import reprlib
from pathlib import Path
from typing import Any

from warpcore.errors import UserError
from warpcore.files import read_bytes
from warpcore.redaction import redact

_BROKEN = re.compile("[\0\ud800-\udfff]")
# The longer mark first: that of UTF-16 is how the one of UTF-32 begins.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class EncodingError(UserError):
    """The bytes are no text that is understood; the message names the file, the first such byte, and what to do."""


def decode_text(content: bytes, name: object) -> str:
    """The text in the bytes of a file, without its byte order mark; `name` is the file's, for the message.

    Without a mark it has to be UTF-8: guessing another encoding would put wrong letters into captions.

    Raises:
        EncodingError: it is of another encoding.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise EncodingError(
            f"{name} is not {encoding.upper()} text: byte {place} ({content[place]:#04x}) cannot be read. Save it as "
            f"UTF-8; if it is Latin-1 (Windows), with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
        ) from None
    if (place := text.find("\0")) >= 0:
        raise EncodingError(
            f"{name} is not text: character {place} is a zero. Save it as UTF-8; if it is UTF-16 without a byte order "
            "mark, with: iconv -f UTF-16LE -t UTF-8 FILE > NEW"
        )
    return text


def read_text(path: Path) -> str:
    """The text in a file, its lines ending with a single line feed.

    Raises:
        EncodingError: it is of an encoding that is not understood.
        NotAFileError: it is a folder, a pipe, a socket or a device.
    """
    return decode_text(read_bytes(path), path).replace("\r\n", "\n").replace("\r", "\n")


def format_bytes(number: float) -> str:
    """A number of bytes as text, such as `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def counted(number: int, noun: str) -> str:
    """`1 tar`, `2 tars`."""
    return f"{number} {noun}" + "s" * (number != 1)


def is_whole(text: str) -> bool:
    """Whether it is text that files can hold: no character zero, and no half of a character, as surrogates are."""
    return _BROKEN.search(text) is None


def printable(text: str) -> str:
    """The text on one line: what no terminal shows, such as line ends in names of files, as Python escapes it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(text: str, most: int = 200) -> str:
    """The text without credentials, cut off where it has more characters than `most`."""
    start = redact(text[: 10 * most])  # before it is cut off: half a password does not look like one
    return start if len(text) <= most else f"{start[:most]}... ({len(text)} characters)"


def brief(value: Any) -> str:
    """A value as Python writes it, cut off where it is long or deep, however large it is."""
    return _BRIEF.repr(value)


class _Brief(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 200, 200
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 10

    def repr_str(self, value: str, level: int) -> str:
        return super().repr_str(redact(value[: 10 * self.maxstring]), level)

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # Python refuses to write a number of thousands of digits
            return f"a number of about {value.bit_length() * 3 // 10} digits"
        return repr(value)


_BRIEF = _Brief()
