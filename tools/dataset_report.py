"""The report of tools/build_dataset.py: what became of the pictures and videos of a folder."""

import io
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from families.common.captions import CLIP_LENGTH
from families.common.members import SIDE_MEMBERS
from tools.picture_folder import Entry
from warpcore.data.picture_files import SHOWN, LeftOut
from warpcore.data.samples import FORMATS, VISUAL_EXTENSIONS
from warpcore.data.video_headers import Header
from warpcore.errors import UserError
from warpcore.text import counted, format_bytes, printable

RATIOS = ("9:21", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "21:9")


@dataclass(frozen=True)
class Checked:
    """A picture or video that can be used."""

    size: tuple[int, int]
    """(width, height) in px."""
    members: dict[str, int]
    """Sizes in bytes."""
    is_empty: bool
    """Whether its caption is."""
    is_long: bool
    """Whether its caption loses its end in the text encoder."""
    video: Header | None
    """Of a video."""
    has_weights: bool = False
    """Whether its caption holds weights such as `(word:1.2)`, which are read as text."""
    is_animation: bool = False
    """Whether it is a picture file with several frames, of which the first is taken."""


@dataclass
class Report:
    """What became of the pictures and videos."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) in px of those that were kept."""
    videos: list[Header] = field(default_factory=list)
    """Of those of them that are videos."""
    animations: list[str] = field(default_factory=list)
    """Pictures in whose files are further frames."""
    left_out: LeftOut = field(default_factory=LeftOut)
    members: Counter[str] = field(default_factory=Counter)
    """How many of those that were kept have a member such as `txt` or `mask.png`."""
    without_caption: list[str] = field(default_factory=list)
    """Those that have none."""
    empty_captions: list[str] = field(default_factory=list)
    """Those whose caption is empty."""
    long_captions: list[str] = field(default_factory=list)
    """Those with captions of which the text encoder reads only the beginning."""
    weighted_captions: list[str] = field(default_factory=list)
    """Those with captions in which words have weights."""
    notes: list[str] = field(default_factory=list)
    """How the metadata were read."""
    shards: int = 0
    bytes_written: int = 0

    def add(self, entry: Entry, checked: "Checked | str", folder: Path) -> bool:
        """Count a picture, a video or a part of one; whether it is kept."""
        name = str(entry.picture.relative_to(folder))
        if isinstance(checked, str):
            self.left_out.add(checked, name)
            return False
        self.sizes.append(checked.size)
        if checked.video:
            self.videos.append(checked.video)
        self.members.update(checked.members.keys())
        if "txt" not in checked.members:
            self.without_caption.append(name)
        if checked.is_animation:
            self.animations.append(name)
        if checked.is_empty:
            self.empty_captions.append(name)
        if checked.is_long:
            self.long_captions.append(name)
        if checked.has_weights:
            self.weighted_captions.append(name)
        return True

    def refuse_nothing(self, folder: Path) -> None:
        """Raises UserError where nothing is kept."""
        if not self.sizes:
            why = self.left_out if self.left_out else f"none of {', '.join(VISUAL_EXTENSIONS)}"
            raise UserError(f"{folder} holds no usable picture or video: {why}")

    def __str__(self) -> str:
        counts = {"picture": len(self.sizes) - len(self.videos), "video": len(self.videos)}
        kept = " and ".join(counted(count, what) for what, count in counts.items() if count)
        lines = [f"kept {kept} in {counted(self.shards, 'tar')} ({format_bytes(self.bytes_written)})"]
        if self.videos:
            lines.append(self._of_videos())
        if beside := ", ".join(f"{self.members[name]} .{name}" for name in SIDE_MEMBERS if self.members[name]):
            lines.append(f"  beside them: {beside}")
        lines += [f"  {note}" for note in self.notes]
        if self.animations:
            lines.append(
                f"  several frames in a picture's file: {len(self.animations)} ({_first(self.animations)}); the first "
                "one is taken: convert them to .mp4 to train on clips"
            )
        if self.without_caption:
            lines.append(
                f"  no caption: {len(self.without_caption)} ({_first(self.without_caption)}); training with captions "
                "from .txt leaves them out"
            )
        if self.empty_captions:
            lines.append(f"  empty caption: {len(self.empty_captions)} ({_first(self.empty_captions)})")
        if self.long_captions:
            lines.append(
                f"  caption longer than the {CLIP_LENGTH} tokens that CLIP reads: {len(self.long_captions)} of "
                f"{self.members['txt']} ({_first(self.long_captions)}); training cuts off the rest"
            )
        if self.weighted_captions:
            lines.append(
                f"  weights such as (word:1.2) in captions: {len(self.weighted_captions)} "
                f"({_first(self.weighted_captions)}); training reads them as text, brackets and numbers included"
            )
        lines = [*map(printable, lines), str(self.left_out)]
        pixels = sorted(width * height for width, height in self.sizes)
        names = {"smallest": pixels[0], "median": statistics.median(pixels), "largest": pixels[-1]}
        lines.append("megapixels: " + ", ".join(f"{name} {_megapixels(value)}" for name, value in names.items()))
        lines.append("aspect ratios (width : height):")
        counts = Counter(_nearest_ratio(width / height) for width, height in self.sizes)
        lines += [
            f"  {ratio:>5} {counts[ratio]:>8} {'#' * -(-40 * counts[ratio] // max(counts.values()))}"
            for ratio in RATIOS
            if counts[ratio]
        ]
        return "\n".join(lines)

    def _of_videos(self) -> str:
        def spread(name: str) -> str:
            values = [getattr(one, name) for one in self.videos]
            return f"{min(values):.4g} to {max(values):.4g}"

        codecs = Counter(one.codec for one in self.videos).most_common()
        variable = sum(not one.constant_rate for one in self.videos)
        return (
            f"  videos: {spread('num_frames')} frames, {spread('seconds')} s, {spread('fps')} frames per second; "
            + ", ".join(f"{count} {codec}" for codec, count in codecs)
            + (f"; {variable} of a variable rate" if variable else "")
        )


def _megapixels(pixels: float) -> str:
    """Two digits after the point, and of small pictures two that are not 0."""
    return f"{pixels / 1e6:.2f}" if pixels >= 1e5 else f"{pixels / 1e6:.2g}"


def is_animation(content: bytes) -> bool:
    """Whether the file of a picture, which can be decoded, holds several frames or pages. Those of cameras may hold a
    preview as well (MPO), and are none."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        try:
            return image.format != "MPO" and getattr(image, "is_animated", False)
        except Exception:  # Pillow's readers meet broken bytes with exceptions of many kinds
            return True  # what follows the first frame is broken


def _first(names: list[str]) -> str:
    names = list(dict.fromkeys(names))  # a video has one for each of its parts
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _nearest_ratio(ratio: float) -> str:
    def distance(name: str) -> float:
        width, height = map(int, name.split(":"))
        return max(ratio * height / width, width / (ratio * height))

    return min(RATIOS, key=distance)
