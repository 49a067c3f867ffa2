"""What indexing reads of a tar's members: the sizes of pictures, from their headers, and the content of texts."""

import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from warpcore.data.identity import HASHED_BYTES
from warpcore.data.picture_costs import CountedFile, check_tags, orientation
from warpcore.data.samples import FORMATS, PICTURE_EXTENSIONS, PICTURE_FACTS, VIDEO_EXTENSIONS
from warpcore.data.storage import patiently
from warpcore.data.video_headers import read_header
from warpcore.errors import UserError
from warpcore.safe_json import parse_json

TEXT_EXTENSIONS = ("txt", "json", PICTURE_FACTS)
"""Members that are read whole."""
COUNTED_EXTENSIONS = ("webm", "mkv", "avi", "ts")
"""Videos without a count of frames: the packets in all of their bytes are counted."""
MAX_TEXT_BYTES = 16 << 20
"""Of such a member; JSON takes twenty times its size in memory."""
LONG_TEXT = f"a text of more than {MAX_TEXT_BYTES >> 20} MiB"
"""The start of the problem of a row that has a longer one."""
MAX_PROBLEM = 500
"""Characters of what a file says of itself that is wrong with it."""
MAX_CODEC = 40
"""Characters of the name of one."""
UNDECODABLE_VIDEO = "undecodable video"
"""The start of the problem of a row whose video is damaged."""


class Visual(NamedTuple):
    """What the index says of a picture or a video, or why it can't be drawn."""

    width: int = 0
    height: int = 0
    """In px as shown."""
    problem: str | None = None
    video: dict[str, Any] | None = None
    """The fields of a video's `Header` but its size, as far as they are known."""


def look(file: BinaryIO, content_hash: Any, extension: str, offset: int, size: int) -> Any:
    """What the index needs of a member: a `Visual` of a picture, a video or its facts, the content of a .json.

    `content_hash` is updated with what it is identified by.
    """
    is_whole = extension in TEXT_EXTENSIONS and size <= MAX_TEXT_BYTES
    start = _read_at(file, offset, size if is_whole else min(size, HASHED_BYTES))
    content_hash.update(start)
    if extension in PICTURE_EXTENSIONS:
        return _measure(_Window(file, offset, size, start), _picture, f"undecodable .{extension}")
    if extension in VIDEO_EXTENSIONS:
        return _measure(_Window(file, offset, size, start), _video, UNDECODABLE_VIDEO)
    if extension == PICTURE_FACTS:
        return _told(_as_json(start))
    return _as_json(start) if extension == "json" else None


def _told(facts: dict[str, Any]) -> Visual:
    """What is said of a picture or a video that is not there."""
    width, height, problem = (facts.get(name) for name in ("width", "height", "problem"))
    if not (isinstance(width, int) and isinstance(height, int)):
        return Visual(problem=f"its .{PICTURE_FACTS} has no width and height")
    frames, fps = facts.get("num_frames"), facts.get("fps")
    is_video = type(frames) is int and type(fps) in (int, float) and 0 < frames < 2**31 and 0 < fps < 2**31
    video = {"num_frames": frames, "fps": float(fps)} | _further_told(facts) if is_video else None
    return Visual(int(width), int(height), None if problem is None else str(problem)[:MAX_PROBLEM], video)


def _further_told(facts: dict[str, Any]) -> dict[str, Any]:
    """What is said of a video beside its size and frames, as far as it can be."""
    seconds, codec, constant, rotation = (facts.get(n) for n in ("seconds", "codec", "constant_rate", "rotation"))
    return {
        "seconds": float(seconds) if type(seconds) in (int, float) and 0 <= seconds < 2**31 else None,
        "codec": codec if isinstance(codec, str) and codec.isascii() and len(codec) <= MAX_CODEC else None,
        "constant_rate": constant if isinstance(constant, bool) else None,
        "rotation": rotation if rotation in (0, 90, 180, 270) and type(rotation) is int else None,
    }


def _measure(window: "_Window", measured: Callable[[BinaryIO], Visual], complaint: str) -> Visual:
    try:
        return measured(io.BufferedReader(window))
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder makes of hostile bytes says only that the file is unusable
        if window.fault is not None:
            raise window.fault from None
        return Visual(problem=f"{complaint}: {str(error).split('<')[0].strip() or type(error).__name__}")


def _picture(file: BinaryIO) -> Visual:
    return Visual(*picture_size(file))


def _video(file: BinaryIO) -> Visual:
    header = asdict(read_header(file))
    return Visual(header.pop("width"), header.pop("height"), video=header)


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """(width, height) in px from the header of a picture, its EXIF rotation applied.

    Raises whatever Pillow raises for content that is no picture.
    """
    check_tags(file := CountedFile(file))
    Image.MAX_IMAGE_PIXELS = None  # a header takes no memory; whoever decodes has a limit of his own
    with Image.open(file, formats=FORMATS) as image:
        turned, (width, height) = orientation(image), image.size
    return (height, width) if turned >= 5 else (width, height)


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    def read() -> bytes:
        file.seek(offset)
        return file.read(size)

    return patiently(read)


class _Window(io.RawIOBase):
    """A member's bytes as a file of their own; its start was read already."""

    def __init__(self, file: BinaryIO, offset: int, size: int, start: bytes):
        self._file, self._offset, self._size, self._start, self._position = file, offset, size, start, 0
        self.fault: OSError | UserError | None = None
        """Why the file could not be read, as decoders may hide it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, position + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._size - self._position))
        try:
            piece = self._start[self._position : self._position + size]
            piece = piece or _read_at(self._file, self._offset + self._position, size)
        except (OSError, UserError) as error:
            self.fault = error
            raise
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _as_json(text: bytes) -> dict[str, Any]:
    """A sample's .json; a broken one counts as empty here: it is a bad sample only where its caption is read."""
    try:
        content = parse_json(text.decode("utf-8-sig"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
