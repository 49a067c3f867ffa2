"""Builds a data set for training from a folder of pictures or videos: tars with their indexes.

    python3 tools/build_dataset.py demo/pictures demo/shards
    torchrun --nproc-per-node 8 tools/build_dataset.py data/pictures data/shards

Takes the pictures and videos of the folder and its sub-folders, also linked ones, and what belongs to them. The
caption of NAME.jpg is NAME.txt (or NAME.jpg.txt, NAME.caption), its fields for filters are NAME.json; both may also
come from a metadata.jsonl, .csv or .parquet with the columns file_name (or path) and text (or caption, prompt,
description: the first that a line has), whose other columns become fields. NAME.cls is its class.
A video is stored as it is, or cut into the pieces that its field or column `cuts` names ([[0, 2.5], [4, 8]], in
seconds) or that --cut makes; pieces are encoded again. --frames-every makes pictures of videos.
The captions of the pictures in a folder `images` may lie in a folder `metas` beside it.
NAME.mask.png, NAME.depth.png, NAME.seg.png and NAME.pose.json go with their picture. What is left out is counted by
reason. The same folder always gives the same bytes, whether one process builds them or many (of torchrun or srun, on
machines that share FOLDER and OUT).

Features that another program stored beside the pictures become a cache: which files, for which training, and in its
config the networks that made them, as such files do not say it:

    python3 tools/build_dataset.py pictures data/cache --import .img_sdvae .txt_clipl \\
        --for train/train_sd.py CONFIG.yaml autoencoder_checkpoint_path=vae text_encoder_checkpoint_path=clip

So does a whole folder of records that another program cached, without pictures:

    python3 tools/build_dataset.py records data/cache --records --for train/train_nova.py CONFIG.yaml
"""

import argparse
import io
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

from families.common.captions import CLIP_LENGTH, is_cut
from families.common.members import SIDE_MEMBERS
from families.common.prompt_weights import has_weights
from modules.tokenizers import BytePairTokenizer
from tools.arguments import local_path, positive
from tools.dataset_report import Checked, Report, is_animation
from tools.metadata import FORMATS
from tools.picture_folder import Entry, find_entries
from tools.picture_sample import Outcome, Unusable, load_samples, load_samples_again
from tools.shard_writer import ASIDE, Packing, ShardWriter, check_free, reserved, sample_bytes, swap
from tools.shared_work import ALONE, SharedWork
from tools.video_parts import WHOLE, Parts
from warpcore.data.catalog import write_manifests
from warpcore.data.index import Summary
from warpcore.data.samples import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, visual_member
from warpcore.data.shards import Shard
from warpcore.data.video_headers import read_header
from warpcore.errors import UserError, run_script
from warpcore.peers import tell_once
from warpcore.processes import Processes, start_processes, stop_processes
from warpcore.progress_bar import ProgressBar
from warpcore.random import stable_hash
from warpcore.text import brief

TEXT_ENCODERS = ("clip", "none")
_LOADED_TOGETHER, _BYTES_TOGETHER = 64, 2**29
"""Files, and bytes of them, that are in memory at a time."""
Samples = Iterable[tuple[str, Outcome]]
"""Key and outcome of each sample that a file becomes."""


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
    parts: Parts = WHOLE,
    processes: Processes = ALONE,
) -> Report:
    """Write what `folder` holds to tars in `out`, each with `samples_per_shard` or about `shard_size_bytes`.

    extra: kinds of pictures beside the pictures, such as `normal` for NAME.normal.png. text_encoder: the one that is
    going to read the captions, some of which may be too long for it. parts: what becomes of videos. processes: share
    the work (collective); the tars are the same for any number of them.

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
                raise UserError(f"{folder} is not a folder of pictures or videos")
            check_free(out, overwrite)
            found = find_entries(folder, metadata, report.left_out, report.notes, out, extra)
            found = (replace(entry, parts=parts) for entry in found)
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


def _checked(outcome: Outcome, tokenizer: BytePairTokenizer | None) -> "Checked | str":
    """What a report has to know of a sample: why it can't be used, if it can't."""
    if isinstance(outcome, Unusable):
        return str(outcome)
    size, members = outcome
    caption = members.get("txt", b"-").decode().strip()
    is_long = tokenizer is not None and is_cut(tokenizer, CLIP_LENGTH, caption)
    visual = visual_member(members)
    video = read_header(io.BytesIO(members[visual])) if visual in VIDEO_EXTENSIONS else None
    moves = visual in PICTURE_EXTENSIONS and is_animation(members[visual])
    sizes = {name: len(content) for name, content in members.items()}
    return Checked(size, sizes, not caption, is_long, video, has_weights(caption), moves)


def _build_alone(
    entries: list[Entry], packing: Packing, report: Report, folder: Path, text_encoder: str, _: SharedWork, aside: Path
) -> dict[Shard, Summary]:
    """Check and write the pictures and videos in one go."""
    tokenizer, shards, writer = _tokenizer(text_encoder), {}, None
    loaded = _load_all(entries, "building")
    for entry, key, outcome in ((entry, *sample) for entry, samples in loaded for sample in samples):
        checked = _checked(outcome, tokenizer)
        if not report.add(entry, checked, folder):
            continue
        writer = writer or ShardWriter(aside, len(shards))
        writer.write(key, outcome[1])
        if packing.add(sample_bytes(key, checked.members)):
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
    """Check the files, each process its share; then write the tars that follow from it, each process its share."""
    tokenizer, is_main = _tokenizer(text_encoder), work.processes.is_main

    def check() -> list[list[tuple[str, Checked | str]]]:
        if not aside.is_dir():
            raise UserError(f"{aside}, made by the main process, is not seen here: OUT wants a folder that all share")
        loaded = _load_all(work.own(entries), "checking", is_main, work.check)
        return [[(key, _checked(outcome, tokenizer)) for key, outcome in samples] for _, samples in loaded]

    shares = [iter(share) for share in work.do(check)]
    tars: list[dict[int, set[str]]] = [{}]  # the keys of samples by the places of their entries
    for number, entry in enumerate(entries):
        for key, checked in next(shares[number % len(shares)]):
            if report.add(entry, checked, folder):
                tars[-1].setdefault(number, set()).add(key)
                if packing.add(sample_bytes(key, checked.members)):
                    tars.append({})
    tars = [tar for tar in tars if tar]
    report.refuse_nothing(folder)

    def write() -> list[tuple[Shard, Summary]]:
        own = work.own(list(enumerate(tars)))
        wanted = [entries[place] for _, tar in own for place in tar]
        loaded = _load_all(wanted, "writing tars", is_main, work.check, load_samples_again)
        made = []
        for number, tar in own:
            writer = ShardWriter(aside, number)
            for keys, (entry, samples) in zip(tar.values(), loaded, strict=False):  # `loaded` goes on in the next tar
                left = set(keys)
                for key, outcome in samples:
                    if key in keys and isinstance(outcome, Unusable):
                        raise UserError(f"{entry.picture} changed while the data set was built: {outcome}")
                    if key in keys:
                        writer.write(key, outcome[1])
                        left.remove(key)
                if left:
                    raise UserError(f"{entry.picture} changed while the data set was built: {min(left)} is gone")
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
    load: Callable[[Entry], Samples] = load_samples,
) -> Iterator[tuple[Entry, Samples]]:
    """Load files in threads, a few at a time, in order; `check` is called in between."""
    progress = ProgressBar(total=len(entries), unit="file", desc=what, mininterval=0.5, disable=not shown)
    with ThreadPoolExecutor() as pool, progress:
        for together in _few(entries):
            check()
            for pair in zip(together, pool.map(load, together), strict=True):
                yield pair
                progress.update()


def _few(entries: list[Entry]) -> Iterator[list[Entry]]:
    """The entries in groups that fit into memory together."""
    together, held = [], 0
    for entry in entries:
        size = entry.picture.stat().st_size if entry.picture.exists() else 0
        if together and (len(together) == _LOADED_TOGETHER or held + size > _BYTES_TOGETHER):
            yield together
            together, held = [], 0
        together, held = [*together, entry], held + size
    if together:
        yield together


def parse_bytes(text: str) -> int:
    """ "500MB", "2GB" or a plain number of bytes."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " ")) if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, found {brief(text)}")
    return size


def parse_seconds(text: str) -> float:
    """A number of seconds above 0."""
    match = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text.strip())
    if not match or not float(text):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, found {brief(text)}")
    return float(text)


def parse_ending(text: str) -> str:
    """`.cached` of "cached" or ".cached"."""
    if not re.fullmatch(r"\.?[\w-]+", text):
        raise argparse.ArgumentTypeError(f"expected an ending such as .img_sdvae, found {brief(text)}")
    return f".{text.removeprefix('.')}"


def _imported(given: argparse.Namespace) -> str:
    """Build a cache of the features of `--import` or `--records`; the report."""
    from tools.feature_import import Imported, ImportedRecords  # what builds networks takes seconds to import

    if not (given.endings or given.records) or len(given.training or ()) < 2:
        raise UserError("--import ENDING ... or --records, and --for SCRIPT CONFIG [KEY=VALUE ...] belong together")
    packing = Packing(given.samples_per_shard, given.shard_size)
    if given.records:
        return ImportedRecords.by(given.training, given.out).build(given.folder, given.out, packing, given.overwrite)
    found = Imported.by(given.training, given.out, given.endings)
    return found.build(given.folder, given.out, packing, given.metadata, given.overwrite)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="pictures and videos, also in sub-folders")
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
    of_videos = parser.add_mutually_exclusive_group()
    of_videos.add_argument(
        "--cut", type=parse_seconds, metavar="SECONDS", help="cut videos that are longer into pieces of this length"
    )
    of_videos.add_argument(
        "--frames-every", type=positive, metavar="N", help="take every N-th frame of videos, as a picture"
    )
    of_others = parser.add_mutually_exclusive_group()
    of_others.add_argument(
        "--import",
        nargs="+",
        type=parse_ending,
        metavar="ENDING",
        dest="endings",
        help="files of features beside the pictures: NAME.ENDING",
    )
    of_others.add_argument("--records", action="store_true", help="FOLDER holds records of features, and no pictures")
    parser.add_argument(
        "--for",
        nargs="+",
        metavar="ARGUMENT",
        dest="training",
        help="the script, the config and keys that train on them",
    )
    given = parser.parse_args(arguments)
    if given.endings or given.records or given.training:
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
            parts=Parts(given.cut, given.frames_every),
            processes=processes,
        )
    finally:
        stop_processes()
    if processes.is_main:
        print(report)
        out = shlex.quote(str(given.out))
        print(f"to look at it: python3 tools/inspect_dataset.py {out} data.html")
        print(f"to train on it: webdataset_path={out}, in a config or behind its name")


if __name__ == "__main__":
    run_script(main, tell_once)
