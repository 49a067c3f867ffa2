"""Builds a data set for training from a folder of pictures: tars with their indexes.

    python3 tools/build_dataset.py demo/pictures demo/shards

Takes the pictures of the folder and its sub-folders, also linked ones, and what belongs to them. The caption of
NAME.jpg is NAME.txt (or NAME.jpg.txt, NAME.caption), its fields for filters are NAME.json; both may also come from a
metadata.jsonl or .csv with the columns file_name and text (or caption), whose other columns become fields.
NAME.mask.png, NAME.depth.png, NAME.seg.png and NAME.pose.json go with their picture. What is left out is counted by
reason. The same folder always gives the same bytes.
"""

import argparse
import io
import re
import shutil
import statistics
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from families.common.captions import CLIP_LENGTH, is_cut
from families.common.members import SIDE_MEMBERS
from modules.tokenizers import BytePairTokenizer
from tools.arguments import local_path, positive
from tools.picture_folder import Entry, find_entries
from tools.picture_sample import Unusable, load_sample
from warpcore.data.catalog import MANIFEST_NAME, write_manifests
from warpcore.data.index import Summary, index_shard
from warpcore.data.picture_files import SHOWN, LeftOut
from warpcore.data.samples import PICTURE_EXTENSIONS
from warpcore.data.shards import Shard
from warpcore.data.storage import storage_for
from warpcore.data.tars import clean
from warpcore.errors import UserError, run_script
from warpcore.files import naming
from warpcore.random import stable_hash

TEXT_ENCODERS = ("clip", "none")
RATIOS = ("9:21", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "21:9")
_OURS = re.compile(r"\d{5,}\.tar(\.index\.parquet)?|" + re.escape(MANIFEST_NAME))
_ASIDE = ".building"
_CHECKED_TOGETHER = 64


@dataclass
class Report:
    """What became of the pictures."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) in px of those that were kept."""
    left_out: LeftOut = field(default_factory=LeftOut)
    members: Counter[str] = field(default_factory=Counter)
    """How many of those that were kept have a member such as `txt` or `mask.png`."""
    empty_captions: list[str] = field(default_factory=list)
    """Their pictures."""
    long_captions: list[str] = field(default_factory=list)
    """Pictures with captions of which the text encoder reads only the beginning."""
    shards: int = 0
    bytes_written: int = 0

    def __str__(self) -> str:
        lines = [f"kept {len(self.sizes)} pictures in {self.shards} tars ({self.bytes_written / 1e6:.1f} MB)"]
        if beside := ", ".join(f"{self.members[name]} a .{name}" for name in SIDE_MEMBERS if self.members[name]):
            lines.append(f"  of them have {beside}")
        if without := len(self.sizes) - self.members["txt"]:
            lines.append(f"  {without} have no .txt; training with captions from .txt leaves them out")
        if self.empty_captions:
            lines.append(f"  {len(self.empty_captions)} have an empty caption: {_first(self.empty_captions)}")
        if self.long_captions:
            lines.append(
                f"  {len(self.long_captions)} of {self.members['txt']} captions are longer than the {CLIP_LENGTH} "
                f"tokens that CLIP reads; training cuts off the rest: {_first(self.long_captions)}"
            )
        lines.append(str(self.left_out))
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


def build_dataset(
    folder: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    shard_size_bytes: int | None = None,
    metadata: Path | None = None,
    overwrite: bool = False,
    extra: Sequence[str] = (),
    text_encoder: Literal[TEXT_ENCODERS] = "clip",
) -> Report:
    """Write the pictures of `folder` to tars in `out`, each with `samples_per_shard` or about `shard_size_bytes`.

    extra: kinds of pictures beside the pictures, such as `normal` for NAME.normal.png. text_encoder: the one that is
    going to read the captions, some of which may be too long for it.

    Pictures come in an order that mixes the sub-folders, so that neighbours in a tar have nothing in common. All is
    written aside first; what `out` held goes when everything is there.

    Raises:
        UserError: no such folder, nothing usable in it, or `out` holds something and `overwrite` is False.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures")
    _check_free(out, overwrite)
    report = Report()
    entries = sorted(
        find_entries(folder, metadata, report.left_out, out, extra), key=lambda entry: stable_hash(entry.key)
    )
    with _aside(out) as aside:
        writer = _ShardWriter(aside, samples_per_shard, shard_size_bytes)
        _write_all(entries, writer, report, folder, text_encoder)
        if not report.sizes:
            why = report.left_out if report.left_out else f"none of {', '.join(PICTURE_EXTENSIONS)}"
            raise UserError(f"{folder} holds no usable picture: {why}")
        write_manifests(list(writer.shards), {shard.url: summary for shard, summary in writer.shards.items()})
        _swap(aside, out)
    report.shards, report.bytes_written = len(writer.shards), sum(shard.size_bytes for shard in writer.shards)
    return report


def _write_all(entries: list[Entry], writer: "_ShardWriter", report: Report, folder: Path, text_encoder: str) -> None:
    tokenizer = BytePairTokenizer() if text_encoder == "clip" else None
    with tqdm(total=len(entries), unit="picture", desc="building", mininterval=0.5) as progress:
        for entry, outcome in _load_all(entries):
            progress.update()
            name = str(entry.picture.relative_to(folder))
            if isinstance(outcome, Unusable):
                report.left_out.add(str(outcome), name)
                continue
            size, members = outcome
            report.sizes.append(size)
            report.members.update(members.keys())
            caption = members.get("txt", b"-").decode().strip()
            if not caption:
                report.empty_captions.append(name)
            if tokenizer and is_cut(tokenizer, CLIP_LENGTH, caption):
                report.long_captions.append(name)
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


def _load_all(
    entries: list[Entry],
) -> Iterator[tuple[Entry, "tuple[tuple[int, int], dict[str, bytes]] | Unusable"]]:
    """Read and check pictures in threads, a few at a time, in order."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), _CHECKED_TOGETHER):
            together = entries[start : start + _CHECKED_TOGETHER]
            yield from zip(together, pool.map(load_sample, together), strict=True)


class _ShardWriter:
    """Writes samples to one tar after the other, each with its index."""

    def __init__(self, out: Path, samples_per_shard: int, shard_size_bytes: int | None):
        self.shards: dict[Shard, Summary] = {}
        self._out = out
        self._samples_per_shard, self._shard_size_bytes = samples_per_shard, shard_size_bytes
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        with naming(self._path):
            self._add(key, members)

    def _add(self, key: str, members: dict[str, bytes]) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (close_shard closes it)
        for member, content in members.items():
            info = tarfile.TarInfo(f"{key}.{member}")  # no times or owners: equal folders give equal bytes
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._samples += 1
        by_size = self._shard_size_bytes is not None
        if self._tar.offset >= self._shard_size_bytes if by_size else self._samples == self._samples_per_shard:
            self.close_shard()

    def close_shard(self) -> None:
        if self._tar is None:
            return
        with naming(self._path):
            self._tar.close()
        url = str(self._path.resolve())
        shard = Shard(url, *storage_for(url).stat(url))
        self.shards[shard] = index_shard(shard)
        self._tar, self._samples = None, 0

    @property
    def _path(self) -> Path:
        return self._out / f"{len(self.shards):05d}.tar"


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


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
    parser.add_argument(
        "--extra", nargs="+", default=(), metavar="KIND",
        help=f"further pictures beside the pictures: normal for NAME.normal.png; known are {', '.join(SIDE_MEMBERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--text-encoder", choices=TEXT_ENCODERS, default="clip", help="count the captions that are too long for it"
    )
    given = parser.parse_args(arguments)
    report = build_dataset(
        given.folder,
        given.out,
        samples_per_shard=given.samples_per_shard,
        shard_size_bytes=given.shard_size,
        metadata=given.metadata,
        overwrite=given.overwrite,
        extra=given.extra,
        text_encoder=given.text_encoder,
    )
    print(report)


if __name__ == "__main__":
    run_script(main)
