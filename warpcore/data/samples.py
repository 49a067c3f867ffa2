"""What travels from the plan to the workers: which rows a micro-batch holds and where their bytes are."""

from collections.abc import Iterable
from dataclasses import dataclass, field

# In order of preference, where one sample holds several pictures: the first one present is *the* picture.
PICTURE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "jpe", "jp2", "ppm", "tga", "qoi",
)  # fmt: skip

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "ts")
"""In order of preference, of a sample that has no picture."""
VISUAL_EXTENSIONS = (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS)

PICTURE_FACTS = "picture.json"
"""Extension of what stands for a picture or a video that a tar does not hold, such as one of cached latents: its true
`width` and `height` in px, of a video the other columns of the index, perhaps a `problem` why it can't be drawn, and
`crops`: of each variant the [top, left] of its crop in px of the resized picture."""

COMMON_KINDS = ("mask.png", "depth.png", "seg.png")
"""Pictures beside the picture of a sample that are known to be no picture of another sample, however few have them."""

# Formats that hold pixels and nothing else: Pillow would hand an EPS to Ghostscript, a program that it can run.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI")


PICKLES = ("pickle", "pkl")
"""Extensions under which text features are published that are not read, as a pickle can run code."""
NO_PICKLE = (
    "a pickle, which can run code and is never read: where it holds text features, make them from the captions with "
    "python3 tools/cache.py SCRIPT CONFIG OUT --features texts"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row drawn once: everything a worker needs to read and decode it."""

    shard: str
    """URL or path of the tar."""
    key: str
    members: dict[str, tuple[int, int]]
    """Extension without its leading dot ("jpg", "json", "mask.png") -> (offset, size) of its bytes in the tar."""
    width: int
    height: int
    """True size in px, EXIF rotation applied."""
    seed: int
    """63 bits, from (run seed, epoch, row, repeat): all randomness of the sample starts here."""
    version: tuple[int, str] | None = None
    """(size in bytes, etag) of the tar that was planned with; bytes of another one are refused. None: any will do."""
    columns: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Values of the index columns that the run asks for."""
    joined: dict[str, tuple[str, tuple[int, str]]] | None = None
    """Of those `members` that lie in another tar of the same samples, such as a cache's: its URL and version."""
    num_frames: int = 1
    """Of a video, those that are shown; a picture is a clip of one frame."""
    fps: float = 0.0
    """Frames per second on average; 0 of a picture."""

    @property
    def is_video(self) -> bool:
        return self.fps > 0

    def tar_of(self, member: str) -> tuple[str, tuple[int, str] | None]:
        """URL and version of the tar in which a member lies."""
        if self.joined is not None and member in self.joined:
            return self.joined[member]
        return self.shard, self.version


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The atom of the plan: samples of one bucket that go through the network together."""

    number: int
    """Global micro-batch number: its place in the run."""
    size: tuple[int, ...]
    """Bucket (H, W) in px; of clips (frames, H, W)."""
    samples: tuple[Sample, ...]
    lane: int
    state: dict
    """JSON-able state of the lane after this micro-batch."""
    epoch: int
    """The lane's epoch when the micro-batch was filled; single rows may have waited since an earlier one."""
    notes: tuple[str, ...] = ()
    """What a person should read when the micro-batch is consumed, such as the rows that wait at an epoch's end."""


def picture_member(extensions: Iterable[str]) -> str | None:
    """The extension of the sample's picture, None where it has none. `mask.png` is not the picture of a sample."""
    present = set(extensions)
    return next((extension for extension in PICTURE_EXTENSIONS if extension in present), None)


def visual_member(extensions: Iterable[str]) -> str | None:
    """The extension of what the sample shows: its picture, or else its video; None where it has neither."""
    present = set(extensions)
    return next((extension for extension in VISUAL_EXTENSIONS if extension in present), None)
