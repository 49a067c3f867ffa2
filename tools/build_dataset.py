"""Builds a data set for training from a folder of pictures: tars with their indexes.

    python3 tools/build_dataset.py demo/pictures demo/shards
    torchrun --nproc-per-node 8 tools/build_dataset.py data/pictures data/shards

Takes the pictures of the folder and its sub-folders, also linked ones, and what belongs to them. The caption of
NAME.jpg is NAME.txt (or NAME.jpg.txt, NAME.caption), its fields for filters are NAME.json; both may also come from a
metadata.jsonl, .csv or .parquet with the columns file_name and text (or caption, prompt, description: the first that a
line has), whose other columns become fields. NAME.cls is its class.
The captions of the pictures in a folder `images` may lie in a folder `metas` beside it.
NAME.mask.png, NAME.depth.png, NAME.seg.png and NAME.pose.json go with their picture. What is left out is counted by
reason. The same folder always gives the same bytes, whether one process builds them or many (of torchrun or srun, on
machines that share FOLDER and OUT).

Features that another program stored beside the pictures become a cache: which files, for which training, and in its
config the networks that made them, as such files do not say it:

    python3 tools/build_dataset.py pictures data/cache --import .img_sdvae .txt_clipl \\
        --for train/train_sd.py CONFIG.yaml autoencoder_checkpoint_path=vae text_encoder_checkpoint_path=clip
"""

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from families.common.captions import CLIP_LENGTH, is_cut
from families.common.members import SIDE_MEMBERS
from modules.tokenizers import BytePairTokenizer
from tools.arguments import local_path, positive
from tools.metadata import FORMATS
from tools.picture_folder import Entry, find_entries
from tools.picture_sample import Outcome, Unusable, load_again, load_sample
from tools.shard_writer import ASIDE, Packing, ShardWriter, check_free, reserved, sample_bytes, swap
from tools.shared_work import ALONE, SharedWork
from warpcore.data.catalog import write_manifests
from warpcore.data.index import Summary
from warpcore.data.picture_files import SHOWN, LeftOut
from warpcore.data.samples import PICTURE_EXTENSIONS
from warpcore.data.shards import Shard
from warpcore.data.tars import clean
from warpcore.errors import UserError, run_script
from warpcore.peers import tell_once
from warpcore.processes import Processes, start_processes, stop_processes
from warpcore.progress_bar import ProgressBar
from warpcore.random import stable_hash
from warpcore.text import brief, counted, format_bytes

TEXT_ENCODERS = ("clip", "none")
RATIOS = ("9:21", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "21:9")
_CHECKED_TOGETHER = 64


@dataclass
class Report:
    """What became of the pictures."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) in px of those that were kept."""
    left_out: LeftOut = field(default_factory=LeftOut)
    members: Counter[str] = field(default_factory=Counter)
    """How many of those that were kept have a member such as `txt` or `mask.png`."""
    without_caption: list[str] = field(default_factory=list)
    """Pictures that have none."""
    empty_captions: list[str] = field(default_factory=list)
    """Pictures whose caption is empty."""
    long_captions: list[str] = field(default_factory=list)
    """Pictures with captions of which the text encoder reads only the beginning."""
    notes: list[str] = field(default_factory=list)
    """How the metadata were read."""
    shards: int = 0
    bytes_written: int = 0

    def add(self, entry: Entry, checked: "_Checked | str", folder: Path) -> bool:
        """Count a picture; whether it is kept."""
        name = str(entry.picture.relative_to(folder))
        if isinstance(checked, str):
            self.left_out.add(checked, name)
            return False
        self.sizes.append(checked.size)
        self.members.update(checked.members.keys())
        if "txt" not in checked.members:
            self.without_caption.append(name)
        if checked.is_empty:
            self.empty_captions.append(name)
        if checked.is_long:
            self.long_captions.append(name)
        return True

    def refuse_nothing(self, folder: Path) -> None:
        """Raises UserError where no picture is kept."""
        if not self.sizes:
            why = self.left_out if self.left_out else f"none of {', '.join(PICTURE_EXTENSIONS)}"
            raise UserError(f"{folder} holds no usable picture: {why}")

    def __str__(self) -> str:
        kept, tars = counted(len(self.sizes), "picture"), counted(self.shards, "tar")
        lines = [f"kept {kept} in {tars} ({format_bytes(self.bytes_written)})"]
        if beside := ", ".join(f"{self.members[name]} .{name}" for name in SIDE_MEMBERS if self.members[name]):
            lines.append(f"  beside them: {beside}")
        lines += [f"  {note}" for note in self.notes]
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
    processes: Processes = ALONE,
) -> Report:
    """Write the pictures of `folder` to tars in `out`, each with `samples_per_shard` or about `shard_size_bytes`.

    extra: kinds of pictures beside the pictures, such as `normal` for NAME.normal.png. text_encoder: the one that is
    going to read the captions, some of which may be too long for it. processes: share the work (collective); the tars
    are the same for any number of them.

    Pictures come in an order that mixes the sub-folders, so that neighbours in a tar have nothing in common. All is
    written aside first; what `out` held goes when everything is there. Where the last step, the swap, is interrupted,
    the next start finishes it.

    Raises:
        UserError: no such folder, nothing usable in it, or `out` holds something and `overwrite` is False.
    """
    report, aside = Report(), out / ASIDE
    work = SharedWork(processes, aside)
    with ExitStack() as until_done:

        def begin() -> list[Entry]:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder of pictures")
            check_free(out, overwrite)
            found = find_entries(folder, metadata, report.left_out, report.notes, out, extra)
            entries = sorted(found, key=lambda entry: stable_hash(entry.key))
            until_done.enter_context(reserved(aside))
            return entries

        entries = work.on_main(begin)
        build = _build_alone if processes.count == 1 else _build_together
        shards = build(
            entries, Packing(samples_per_shard, shard_size_bytes), report, folder, text_encoder, work, aside
        )
        if processes.is_main:
            write_manifests(list(shards), {shard.url: summary for shard, summary in shards.items()})
            swap(aside)
    report.shards, report.bytes_written = len(shards), sum(shard.size_bytes for shard in shards)
    return report


@dataclass(frozen=True)
class _Checked:
    """A picture that can be used."""

    size: tuple[int, int]
    """(width, height) in px."""
    members: dict[str, int]
    """Sizes in bytes."""
    is_empty: bool
    """Whether its caption is."""
    is_long: bool
    """Whether its caption loses its end in the text encoder."""


def _checked(entry: Entry, outcome: Outcome, tokenizer: BytePairTokenizer | None) -> "_Checked | str":
    """What a report has to know of a picture: why it can't be used, if it can't."""
    if isinstance(outcome, Unusable):
        return str(outcome)
    size, members = outcome
    caption = members.get("txt", b"-").decode().strip()
    is_long = tokenizer is not None and is_cut(tokenizer, CLIP_LENGTH, caption)
    return _Checked(size, {name: len(content) for name, content in members.items()}, not caption, is_long)


def _build_alone(
    entries: list[Entry], packing: Packing, report: Report, folder: Path, text_encoder: str, _: SharedWork, aside: Path
) -> dict[Shard, Summary]:
    """Check and write the pictures in one go."""
    tokenizer, shards, writer = _tokenizer(text_encoder), {}, None
    for entry, outcome in _load_all(entries, "building"):
        checked = _checked(entry, outcome, tokenizer)
        if not report.add(entry, checked, folder):
            continue
        writer = writer or ShardWriter(aside, len(shards))
        writer.write(entry.key, outcome[1])
        if packing.add(sample_bytes(entry.key, checked.members)):
            _finish(writer, shards)
            writer = None
    if writer is not None:
        _finish(writer, shards)
    report.refuse_nothing(folder)
    return shards


def _finish(writer: ShardWriter, shards: dict[Shard, Summary]) -> None:
    writer.close()
    shard, summary = writer.indexed()
    shards[shard] = summary


def _build_together(
    entries: list[Entry],
    packing: Packing,
    report: Report,
    folder: Path,
    text_encoder: str,
    work: SharedWork,
    aside: Path,
) -> dict[Shard, Summary]:
    """Check the pictures, each process its share; then write the tars that follow from it, each process its share."""
    tokenizer, is_main = _tokenizer(text_encoder), work.processes.is_main

    def check() -> list[_Checked | str]:
        if not aside.is_dir():
            raise UserError(f"{aside}, made by the main process, is not seen here: OUT wants a folder that all share")
        loaded = _load_all(work.own(entries), "checking pictures", is_main, work.check)
        return [_checked(entry, outcome, tokenizer) for entry, outcome in loaded]

    shares = [iter(share) for share in work.do(check)]
    tars: list[list[Entry]] = [[]]
    for number, entry in enumerate(entries):
        checked = next(shares[number % len(shares)])
        if report.add(entry, checked, folder):
            tars[-1].append(entry)
            if packing.add(sample_bytes(entry.key, checked.members)):
                tars.append([])
    tars = [tar for tar in tars if tar]
    report.refuse_nothing(folder)

    def write() -> list[tuple[Shard, Summary]]:
        own = work.own(list(enumerate(tars)))
        loaded = _load_all([entry for _, tar in own for entry in tar], "writing tars", is_main, work.check, load_again)
        made = []
        for number, tar in own:
            writer = ShardWriter(aside, number)
            for entry, outcome in islice(loaded, len(tar)):
                if isinstance(outcome, Unusable):
                    raise UserError(f"{entry.picture} changed while the data set was built: {outcome}")
                writer.write(entry.key, outcome[1])
            writer.close()
            made.append(writer.indexed())
        return made

    made = work.do(write)
    return dict(sorted(chain.from_iterable(made), key=lambda pair: pair[0].url))


def _tokenizer(text_encoder: str) -> BytePairTokenizer | None:
    return BytePairTokenizer() if text_encoder == "clip" else None


def _load_all(
    entries: list[Entry],
    what: str,
    shown: bool = True,
    check: Callable[[], None] = lambda: None,
    load: Callable[[Entry], Outcome] = load_sample,
) -> Iterator[tuple[Entry, Outcome]]:
    """Load pictures in threads, a few at a time, in order; `check` is called in between."""
    progress = ProgressBar(total=len(entries), unit="picture", desc=what, mininterval=0.5, disable=not shown)
    with ThreadPoolExecutor() as pool, progress:
        for start in range(0, len(entries), _CHECKED_TOGETHER):
            check()
            together = entries[start : start + _CHECKED_TOGETHER]
            for pair in zip(together, pool.map(load, together), strict=True):
                progress.update()
                yield pair


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _nearest_ratio(ratio: float) -> str:
    def distance(name: str) -> float:
        width, height = map(int, name.split(":"))
        return max(ratio * height / width, width / (ratio * height))

    return min(RATIOS, key=distance)


def parse_bytes(text: str) -> int:
    """ "500MB", "2GB" or a plain number of bytes."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, found {brief(text)}")
    return size


def parse_ending(text: str) -> str:
    """`.cached` of "cached" or ".cached"."""
    if not re.fullmatch(r"\.?[\w-]+", text):
        raise argparse.ArgumentTypeError(f"expected an ending such as .img_sdvae, found {brief(text)}")
    return f".{text.removeprefix('.')}"


def _imported(given: argparse.Namespace) -> str:
    """Build a cache of the features of `--import`; the report."""
    from tools.feature_import import Imported  # what builds networks takes seconds to import

    if not given.endings or len(given.training or ()) < 2:
        raise UserError("--import ENDING ... and --for SCRIPT CONFIG [KEY=VALUE ...] belong together")
    packing = Packing(given.samples_per_shard, given.shard_size)
    found = Imported.by(given.training, given.endings, given.out)
    return found.build(given.folder, given.out, packing, given.metadata, given.overwrite)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="pictures, also in sub-folders")
    parser.add_argument("out", type=local_path, metavar="OUT", help="where the tars go")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--samples-per-shard", type=positive, default=1000, help="default 1000")
    limits.add_argument("--shard-size", type=parse_bytes, help="such as 500MB, instead of a number of samples")
    parser.add_argument("--metadata", type=local_path, help=f"{FORMATS}; default: the metadata files in FOLDER")
    parser.add_argument("--overwrite", action="store_true", help="replace the tars in OUT")
    parser.add_argument(
        "--extra", nargs="+", default=(), metavar="KIND",
        help=f"further pictures beside the pictures: normal for NAME.normal.png; known are {', '.join(SIDE_MEMBERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--text-encoder", choices=TEXT_ENCODERS, default="clip", help="count the captions that are too long for it"
    )
    parser.add_argument(
        "--import",
        nargs="+",
        type=parse_ending,
        metavar="ENDING",
        dest="endings",
        help="files of features beside the pictures: NAME.ENDING",
    )
    parser.add_argument(
        "--for",
        nargs="+",
        metavar="ARGUMENT",
        dest="training",
        help="the script, the config and keys that train on them",
    )
    given = parser.parse_args(arguments)
    if given.endings or given.training:
        print(_imported(given))
        return
    processes = start_processes("cpu")
    try:
        report = build_dataset(
            given.folder,
            given.out,
            samples_per_shard=given.samples_per_shard,
            shard_size_bytes=given.shard_size,
            metadata=given.metadata,
            overwrite=given.overwrite,
            extra=given.extra,
            text_encoder=given.text_encoder,
            processes=processes,
        )
    finally:
        stop_processes()
    if processes.is_main:
        print(report)


if __name__ == "__main__":
    run_script(main, tell_once)
