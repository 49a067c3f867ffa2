"""Builds a data set for training from a folder of pictures: tars with their indexes.

    python3 tools/build_dataset.py demo/pictures demo/shards

Takes the jpg, jpeg, png and webp files of the folder and its sub-folders. The caption of NAME.jpg is NAME.txt, its
fields for filters are NAME.json; both may also come from a metadata.jsonl or .csv with the columns file_name and
text (or caption), whose other columns become fields. The same folder always gives the same bytes.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tools.arguments import local_path, positive
from tools.metadata import PICTURE_SUFFIXES, read_metadata
from warpcore.data.catalog import MANIFEST_NAME, write_manifests
from warpcore.data.images import MAX_PIXELS
from warpcore.data.index import Summary, index_shard, picture_size
from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.data.tars import clean
from warpcore.errors import UserError, run_script
from warpcore.random import stable_hash

RATIOS = ("9:21", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "21:9")
_OURS = re.compile(r"\d{5,}\.tar(\.index\.parquet)?|" + re.escape(MANIFEST_NAME))
_ASIDE = ".building"
_CHECKED_TOGETHER = 64


@dataclass
class Report:
    """What became of the pictures."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) in px of those that were kept."""
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Reason -> files."""
    without_caption: int = 0
    shards: int = 0
    bytes_written: int = 0

    def __str__(self) -> str:
        lines = [f"kept {len(self.sizes)} pictures in {self.shards} tars ({self.bytes_written / 1e6:.1f} MB)"]
        if self.without_caption:
            lines.append(f"  {self.without_caption} have no .txt; training with captions from .txt leaves them out")
        lines.append(f"skipped {sum(map(len, self.skipped.values()))}")
        for reason, files in sorted(self.skipped.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
            lines.append(f"  {len(files)} {reason}: {shown}")
        pixels = sorted(width * height for width, height in self.sizes)
        names = {"smallest": pixels[0], "median": statistics.median(pixels), "largest": pixels[-1]}
        lines.append("megapixels: " + ", ".join(f"{name} {value / 1e6:.2f}" for name, value in names.items()))
        lines.append("aspect ratios (width : height):")
        counts = Counter(_nearest_ratio(width / height) for width, height in self.sizes)
        lines += [
            f"  {ratio:>5} {counts[ratio]:>8} {'#' * -(-40 * counts[ratio] // max(counts.values()))}"
            for ratio in RATIOS
            if counts[ratio]
        ]
        return clean("\n".join(lines))  # names of files need not be printable


@dataclass(frozen=True)
class _Entry:
    """A picture of the folder, and what belongs to it."""

    key: str
    picture: Path
    companions: dict[str, Path]
    """"txt" and "json" where there are such files."""
    metadata: dict
    """Its line in a metadata file."""


class _Unusable(Exception):
    """Why a picture is skipped."""


def build_dataset(
    folder: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    shard_size_bytes: int | None = None,
    metadata: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the pictures of `folder` to tars in `out`, each of at most so many samples or about so many bytes.

    Pictures come in an order that mixes the sub-folders, so that neighbours in a tar have nothing in common. All is
    written aside first; what `out` held goes when everything is there.

    Raises:
        UserError: no such folder, nothing usable in it, or `out` holds something and `overwrite` is False.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures")
    _check_free(out, overwrite)
    report = Report()
    entries = sorted(_find(folder, metadata, report), key=lambda entry: stable_hash(entry.key))
    with _aside(out) as aside:
        writer = _ShardWriter(aside, samples_per_shard, shard_size_bytes)
        _write_all(entries, writer, report, folder)
        if not report.sizes:
            reasons = "; ".join(f"{len(files)} {reason}" for reason, files in report.skipped.items())
            raise UserError(f"{folder} holds no usable picture ({reasons or 'no ' + ', '.join(PICTURE_SUFFIXES)})")
        write_manifests(list(writer.shards), {shard.url: summary for shard, summary in writer.shards.items()})
        _swap(aside, out)
    report.shards, report.bytes_written = len(writer.shards), sum(shard.size_bytes for shard in writer.shards)
    return report


def _write_all(entries: "list[_Entry]", writer: "_ShardWriter", report: Report, folder: Path) -> None:
    with tqdm(total=len(entries), unit="picture", desc="building", mininterval=0.5) as progress:
        for entry, outcome in _load_all(entries):
            progress.update()
            if isinstance(outcome, _Unusable):
                report.skipped[str(outcome)].append(str(entry.picture.relative_to(folder)))
                continue
            size, members = outcome
            report.sizes.append(size)
            report.without_caption += "txt" not in members
            writer.write(entry.key, members)
    writer.close_shard()


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder to write the tars to")
    if out.exists() and any(path.name != _ASIDE for path in out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or give --overwrite to replace the tars in it")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder in `out`, removed in the end."""
    aside = out / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(aside: Path, out: Path) -> None:
    """Replace the tars of `out` by those that lie aside."""
    for path in out.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
    for path in aside.iterdir():
        path.replace(out / path.name)


def _find(folder: Path, metadata: Path | None, report: Report) -> Iterator[_Entry]:
    """The pictures of the folder with what belongs to them, in order of their paths."""
    lines = read_metadata(folder, metadata)
    used: set[str] = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        by_stem: dict[str, list[Path]] = defaultdict(list)
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith("."):
                by_stem[path.stem].append(path)
        for stem, paths in by_stem.items():
            pictures = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES]
            pictures.sort(key=lambda path: (PICTURE_SUFFIXES.index(path.suffix.lower()), path.name))
            for other in pictures[1:]:
                report.skipped[f"of the same name as another picture ({stem})"].append(str(other.relative_to(folder)))
            if pictures:
                companions = {
                    path.suffix.lower()[1:]: path for path in paths if path.suffix.lower() in (".txt", ".json")
                }
                key = _key(pictures[0].relative_to(folder), used)
                yield _Entry(key, pictures[0], companions, lines.pop(Path(os.path.realpath(pictures[0])), {}))
    for path in lines:
        report.skipped["in the metadata but not in the folder"].append(str(path))


def _key(path: Path, used: set[str]) -> str:
    """The picture's path without its suffix, as a key of a tar: no dots in the name, and unlike all others."""
    name = path.stem.replace(".", "_")
    name = f"sample{name}" if re.fullmatch("__.*__", name) else name
    key = path.with_name(name).as_posix()
    number = 1
    while key in used:
        number += 1
        key = path.with_name(f"{name}_{number}").as_posix()
    used.add(key)
    return key


def _load_all(
    entries: list[_Entry],
) -> Iterator[tuple[_Entry, "tuple[tuple[int, int], dict[str, bytes]] | _Unusable"]]:
    """Read and check pictures in threads, a few at a time, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), _CHECKED_TOGETHER):
            together = entries[start : start + _CHECKED_TOGETHER]
            yield from zip(together, pool.map(_load, together), strict=True)


def _load(entry: _Entry) -> "tuple[tuple[int, int], dict[str, bytes]] | _Unusable":
    """(width, height) in px and the members of a sample, or why it is skipped."""
    try:
        content = _read(entry.picture)
        size = _check_picture(content)
        members = {entry.picture.suffix.lower()[1:]: content, **_description(entry)}
    except _Unusable as reason:
        return reason
    return size, members


def _read(path: Path) -> bytes:
    if not path.exists():
        raise _Unusable("a link that leads nowhere")
    return path.read_bytes()


def _check_picture(content: bytes) -> tuple[int, int]:
    """(width, height) in px of a picture that can be decoded to its end."""
    if not content:
        raise _Unusable("empty file")
    try:
        size = picture_size(io.BytesIO(content))
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _Unusable(f"larger than {MAX_PIXELS / 1e6:.0f} megapixels")
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))  # reads all, computes little
            image.load()
    except _Unusable:
        raise
    except Exception as error:  # whatever Pillow makes of it, it is no picture to train on
        reason = re.split(r"[<(]", str(error))[0].strip()  # what follows differs from file to file
        raise _Unusable(f"unreadable ({reason or type(error).__name__})") from None
    return size


def _description(entry: _Entry) -> dict[str, bytes]:
    """The .txt and .json of a sample from its own files and, for what they lack, from its metadata line."""
    metadata = dict(entry.metadata)
    caption = metadata.pop("text", None)
    members = {}
    if "txt" in entry.companions:
        members["txt"] = _read(entry.companions["txt"])
        try:
            members["txt"].decode()
        except UnicodeDecodeError:
            raise _Unusable("caption is not UTF-8") from None
    elif caption is not None:
        members["txt"] = str(caption).encode()
    if "json" in entry.companions:
        members["json"] = _read(entry.companions["json"])
        try:
            fields = json.loads(members["json"].decode("utf-8-sig"))
        except ValueError:
            raise _Unusable(".json is not JSON") from None
        if metadata and isinstance(fields, dict):
            members["json"] = json.dumps(metadata | fields, ensure_ascii=False).encode()
    elif metadata:
        members["json"] = json.dumps(metadata, ensure_ascii=False).encode()
    return members


class _ShardWriter:
    """Writes samples to one tar after the other, each with its index."""

    def __init__(self, out: Path, samples_per_shard: int, shard_size_bytes: int | None):
        self.shards: dict[Shard, Summary] = {}
        self._out = out
        self._samples_per_shard, self._shard_size_bytes = samples_per_shard, shard_size_bytes
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (close_shard closes it)
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # no times or owners: equal folders give equal bytes
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._samples += 1
        by_size = self._shard_size_bytes is not None
        if self._tar.offset >= self._shard_size_bytes if by_size else self._samples == self._samples_per_shard:
            self.close_shard()

    def close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        url = str(self._path.resolve())
        shard = Shard(url, *storage_for(url).stat(url))
        self.shards[shard] = index_shard(shard)
        self._tar, self._samples = None, 0

    @property
    def _path(self) -> Path:
        return self._out / f"{len(self.shards):05d}.tar"


def _nearest_ratio(ratio: float) -> str:
    def distance(name: str) -> float:
        width, height = map(int, name.split(":"))
        return max(ratio * height / width, width / (ratio * height))

    return min(RATIOS, key=distance)


def parse_bytes(text: str) -> int:
    """ "500MB", "2GB" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="pictures, also in sub-folders")
    parser.add_argument("out", type=local_path, metavar="OUT", help="where the tars go")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--samples-per-shard", type=positive, default=1000, help="default 1000")
    limits.add_argument("--shard-size", type=parse_bytes, help="such as 500MB, instead of a number of samples")
    parser.add_argument("--metadata", type=local_path, help="a .jsonl or .csv; default: the metadata files in FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="replace the tars in OUT")
    given = parser.parse_args(arguments)
    report = build_dataset(
        given.folder,
        given.out,
        samples_per_shard=given.samples_per_shard,
        shard_size_bytes=given.shard_size,
        metadata=given.metadata,
        overwrite=given.overwrite,
    )
    print(report)


if __name__ == "__main__":
    run_script(main)
