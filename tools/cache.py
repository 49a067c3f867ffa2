"""Runs the frozen networks of a training once over its data set, and keeps what they make.

    python3 tools/cache.py train/train_c.py configs/training/quickstart_c.yaml demo/cache
    torchrun --nproc-per-node 8 tools/cache.py train/train_b.py configs/training/finetune_b_700m.yaml data/cache

The tars in OUT mirror those of `webdataset_path`, with latents and conditions in place of pictures: train with
`webdataset_path=OUT` and the same config. `--features latents` and `--features texts` make folders of one kind each,
which can be recreated, extended or deleted alone: train with `caches=[LATENTS,TEXTS]`.

Each picture is cropped once, or `--variants` times; of a video, as many clips are stored, each with frames of its own.
A tar appears when it is complete, so the same command goes on where it was stopped. When the data set changed, it
encodes the pictures and captions that are new, and copies the features of those whose bytes are known, from whichever
tar: for that it reads and hashes both, also when it first makes the cache. A picture keeps the crops that were drawn
for it, a video its frames, whatever row it gets.

`--preview 16 PICTURES.png` makes no cache, but a sheet of what latents of the one in OUT decode to.

Held-out data (`validation_path`) wants a cache of its own: `webdataset_path=HELD_OUT validation_path=null`.
"""

import warpcore.openmp
import argparse
import json
import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, get_args

import torch

from families.common.cache import buckets_of, origin_of
from families.common.cache_commands import KINDS
from families.common.cache_freshness import write_sources
from families.common.cache_records import RECORD_SUFFIX, Record, report
from families.common.cache_writer import Work, shard_at
from families.common.cached_captions import with_token_ids
from families.common.cached_rows import keep_old, old_tars
from families.common.captions import cut_note
from families.common.config import DiffusionConfig
from families.common.features import CACHE_NAME, Dtype, Origin
from families.common.prompts import encode_each, read_prompts, write_prompts
from families.common.training import DiffusionTraining
from families.common.weight_source import only_parts
from tools.arguments import local_path, positive
from tools.cache_encoding import Encoding
from tools.cache_features import PIPELINE_PARTS, Maker, without_idle_weights
from tools.cache_preview import MAX_SAMPLES, write_preview
from tools.cache_timing import seconds_per_sample
from tools.shared_work import MARK_NAME, SharedWork
from warpcore.clip_keys import ClipKeys
from warpcore.config import load_config
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import open_catalog, read_summaries, write_manifests
from warpcore.data.clip_buckets import DRAWN_BY_ROW, ClipBuckets
from warpcore.data.columns import check_missing, column_types, tensor_types
from warpcore.data.fields import naming_keys
from warpcore.data.filters import Filter
from warpcore.data.index import INDEX_SUFFIX, index_shard
from warpcore.data.optional_members import check_optional, optional_members
from warpcore.data.reader import Reader
from warpcore.data.selection import Selection
from warpcore.data.shards import named_folders, resolve_sources
from warpcore.data.survey import survey
from warpcore.errors import UserError, run_script
from warpcore.files import open_plain
from warpcore.locks import lock_file
from warpcore.outputs import check_folder, check_new
from warpcore.peers import tell_once
from warpcore.processes import stop_processes
from warpcore.rehearsal import load_use_case
from warpcore.text import counted, format_bytes

BATCH_SIZE, BATCH_FRAMES = 32, 128
TIMED_SAMPLES = 256
"""How many samples are taken once more from pictures, and from the cache, to say when it pays."""
SEEN_SECONDS = 120
"""Within this time a shared folder shows what another machine wrote."""
_LOCK = ".lock"


@dataclass
class Caching:
    """A cache that is made: for which training, where and how."""

    training: DiffusionTraining
    out: Path
    dtype: Dtype
    variants: int
    batch_size: int
    kind: str = "all"
    """Which features: one of KINDS."""

    def __post_init__(self):
        self._lock: TextIO | None = None
        training = self.training
        training.config = training.config.model_copy(update={"caches": [], "validation_caches": []})
        training.settle_features(None)
        self.maker = Maker(training, self.kind)
        if self.variants != 1 and not self.maker.of_pictures:
            raise UserError("--variants are crops of pictures; of a caption there is one")

    def close(self) -> None:
        """Let go of the networks, of the folder and of the other processes."""
        self.training.networks = None
        if self._lock is not None:
            self._lock.close()
        stop_processes()

    def run(self) -> Record:
        """Write what is missing; on the main process, the record of all.

        Raises:
            UserError: the training can't use a cache, `out` holds something else, weights or pictures are missing.
        """
        training, processes = self.training, self.training.processes
        processes.on_main(self._check_folder)
        named = training.config.webdataset_path
        if self.maker.of_pictures:
            if any(map(Origin.read, named_folders(named))):
                raise UserError(f"webdataset_path: {named} is a cache already: name pictures")
            training.check_cacheable()
        training.caches = None  # all is computed
        self.fields = training.extra_fields() if self.maker.of_pictures else {}
        self.catalog = processes.on_main(lambda: open_catalog(resolve_sources(training.config.webdataset_path)))
        self.work, self.reader = self._work()
        makers = {training.features[name].network for name in self.maker.names}
        training.networks = {
            name: training.make_encoder(name).eval().requires_grad_(False).to(training.device, training.dtype)
            for name in training.encoders()
            if self.kind == "all" or name in makers
        }
        shapes = self.maker.shapes(self.work.buckets.sizes, self.fields)
        origin = origin_of(training, self.maker.names, "float32", self.variants, shapes)
        self.work = replace(self.work, sample_bytes=self.maker.bytes_per_sample(origin))
        self.encoding = Encoding(training, self.maker, self.work, self.reader, self.out, self.dtype)
        processes.on_main(lambda: self._prepare(shapes))
        shared = SharedWork(processes, self.out)
        shared.do(lambda: self.encoding.run(shared))
        return self._finish() if processes.is_main else Record()

    def _work(self) -> tuple[Work, Reader]:
        """What is to be encoded, and what reads it."""
        config, training, has_pictures = self.training.config, self.training, bool(self.maker.of_pictures)
        captions = CaptionGetter.parse(config.captions_getter) if training.needs_captions else None
        members = [(member,) for member in captions.members] if captions else []
        members += [field.suffixes for field in self.fields.values()]
        filters = tuple(Filter.parse(entry) for entry in config.dataset_filters)
        columns = captions.columns if captions else ()
        # Captions have no size: nothing is asked of the autoencoder, whose weights need not be there.
        buckets = (
            buckets_of(training).drawn_by_row()
            if has_pictures
            else Buckets.for_image_size(config.image_size, factor=1)
        )
        selection = Selection(
            filters, tuple(dict.fromkeys(members)), config.max_picture_pixels,
            columns=column_types(self.catalog, columns), required_columns=columns, videos=training.takes_videos,
            buckets=buckets if isinstance(buckets, ClipBuckets) else None,
        )  # fmt: skip
        selection.check(self.catalog, captions, naming_keys(self.fields.values()))
        check_optional(optional_members(self.fields.values()), self.catalog, None)
        of_clips = isinstance(config, ClipKeys)
        frames = {"frame_stride": config.frame_stride, "frame_rate": config.frame_rate} if of_clips else {}
        reader = Reader(
            captions=captions, single_caption=bool(self.maker.of_texts), pictures=has_pictures,
            crop=config.crop_mode, background=config.background, max_pixels=config.max_picture_pixels,
            extra=self.fields, geometry=has_pictures, **frames,
        )  # fmt: skip
        work = Work(
            self.catalog,
            selection,
            buckets,
            captions.members if captions else (),
            config.seed,
            self.variants,
            self.batch_size,
            tuple(field.suffixes for field in self.fields.values()),
            has_pictures,
            bool(self.maker.of_texts),
        )
        return work, reader

    # ------------------------------------------------------------------ before the work

    def _check_folder(self) -> None:
        """Raises UserError where `out` is something else than a cache, or a new or empty folder."""
        check_folder(self.out, "the cache")
        found = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        if found - {_LOCK, MARK_NAME} and Origin.read(str(self.out)) is None:
            raise UserError(f"{self.out} is not empty and holds no cache ({CACHE_NAME}); choose another folder")

    def _prepare(self, shapes: dict[str, dict[str, tuple[int, ...]]]) -> None:
        """Check and mark the folder. Only the main process does this."""
        here = origin_of(self.training, self.maker.names, self.dtype, self.variants, shapes)
        if (there := Origin.read(str(self.out))) is not None:
            self._check_same(there, here)
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = open_plain(self.out / _LOCK, "w")  # held until it is closed
        try:
            lock_file(self._lock, str(self.out), wait=False)
        except BlockingIOError:
            raise UserError(f"{self.out}: another process writes this cache; wait for it, or stop it") from None
        (self.out / MARK_NAME).unlink(missing_ok=True)  # of an earlier start
        mirrors = {self.encoding.path(number) for number in range(len(self.catalog))}
        gone = sorted(set(self.out.rglob("*.tar")) - mirrors)
        same_source = there is not None and there.source == here.source
        if strange := [tar for tar in gone if not (same_source and _is_of(tar, there))]:
            raise UserError(f"{strange[0]} mirrors no tar of webdataset_path, but would be read with it: remove it")
        names = self.training.index_columns()  # which no cache needs, but the runs that read it
        types = column_types(self.catalog, names)
        tensor_types(types, names)
        found = survey(self.catalog, replace(self.work.selection, columns=types))
        if not found.passed:
            raise UserError(f"no sample can be drawn: {found}")
        check_missing(found.missing, found.passed, "training")
        if self.work.buckets.by_row:
            print(f"{DRAWN_BY_ROW}. {found}", flush=True)
        size = self.maker.bytes_per_sample(here)
        done = sum(record.tar_bytes for record in map(self.encoding.record, range(len(self.catalog))) if record)
        missing, free = max(0, size * found.passed - done), shutil.disk_usage(self.out).free
        needed, room = format_bytes(missing), format_bytes(free)
        print(f"{found.passed} samples of about {format_bytes(size)}; {needed} to write to {self.out}", flush=True)
        if missing > free:
            raise UserError(
                f"{self.out}: {needed} are needed, but {room} are free; make room, choose "
                "another folder, or fewer --variants" + (" or --dtype float16" if self.dtype == "float32" else "")
            )
        for folder in {self.out, *(path.parent for path in mirrors)}:
            here.write(folder)
        for tar in gone:  # taken out of the data set; other tars may have got rows of it
            keep_old(tar)
            for file in (tar, *(Path(f"{tar}{suffix}") for suffix in (RECORD_SUFFIX, INDEX_SUFFIX))):
                file.unlink(missing_ok=True)
            print(f"{tar} leaves the cache, as the data set has no tar of its name any more", flush=True)
        for number in range(len(self.catalog)):
            if self.encoding.record(number) is None and self.encoding.path(number).exists():
                keep_old(self.encoding.path(number))  # for `OldRows`, until all tars are complete

    def _check_same(self, there: Origin, here: Origin) -> None:
        if self.maker.of_texts and any(self.out.rglob("*.tar")):
            there = with_token_ids(there, str(self.out), here, self.training.config.captions_getter)
        wrong = there.differences(here, here.features)
        for name in ("dtype", "variants", "seed"):
            if getattr(there, name) != getattr(here, name):
                wrong.append(f"{name} is {getattr(there, name)!r} in the cache, {getattr(here, name)!r} here")
        wrong += [f"it has {name} too" for name in there.features if name not in here.features]
        if wrong:
            raise UserError(f"{self.out} holds another cache: {'; '.join(wrong)}. Choose another folder, or remove it")

    # ------------------------------------------------------------------ after the work

    def _finish(self) -> Record:
        """Index what is not, and sum up."""
        began = time.monotonic()
        while not all(records := [self.encoding.record(number) for number in range(len(self.catalog))]):
            if time.monotonic() - began > SEEN_SECONDS:
                unseen = self.encoding.path(records.index(None))
                raise UserError(f"{unseen}, of another process, is not seen here: OUT wants a folder that all share")
            time.sleep(1)
        shards = [shard_at(self.encoding.path(number)) for number in range(len(self.catalog))]
        summaries = {shard.url: known or index_shard(shard) for shard, known in read_summaries(shards).items()}
        write_manifests(shards, summaries)
        tars = [replace(shard, content=summaries[shard.url].content) for shard in shards]
        write_sources(tars, self.catalog.contents)
        for path in old_tars(self.out):
            path.unlink()
        if self.maker.of_texts:
            self._store_prompts()
        total = Record.total(records)
        if not total.samples:
            raise UserError(
                f"none of the {counted(len(total.unreadable), 'sample')} could be read: {self.out} holds nothing to "
                f"train from; the first one is {total.unreadable[0]}"
            )
        return total

    def waits(self) -> tuple[float, float]:
        """Seconds that a run waits for a sample's features: from pictures, and from this cache."""
        number = next(number for number in range(len(self.catalog)) if self.encoding.record(number).samples)
        shards = self.catalog.shard(number), shard_at(self.encoding.path(number))
        origin = Origin.read(str(self.out))
        return seconds_per_sample(self.training, self.work, self.reader, shards, origin, TIMED_SAMPLES)

    def _store_prompts(self) -> None:
        """Store the conditions of the texts that a run needs beside its captions."""
        training = self.training
        texts, made_with = training.drawn_texts(), training.texts_made_with(origin_of(training, self.maker.names))
        known = read_prompts(str(self.out), made_with)
        lacking = [text for text in texts if text not in known]
        if not lacking:
            return
        for note in cut_note(training.networks["text"], lacking, "sample_prompts"):
            print(note)
        with torch.no_grad(), training.autocast():
            write_prompts(str(self.out), known | encode_each(lacking, training.encode_texts), made_with)


def _is_of(tar: Path, cache: Origin) -> bool:
    """Whether a tar is of a cache, and not of another one in a folder of it."""
    found = Origin.read(str(tar.parent))
    # Its settings may name the tokenizer, which older caches in sub-folders do not.
    is_same = found is not None and replace(found, settings={}) == replace(cache, settings={})
    return is_same and Record.is_beside(tar)


def default_batch_size(config: DiffusionConfig) -> int:
    """Samples that are encoded together where nothing else is said."""
    if not isinstance(config, ClipKeys):
        return BATCH_SIZE
    return max(1, BATCH_FRAMES // max(size[0] for size in config.buckets(1).sizes))


def use_case(script: Path) -> type[DiffusionTraining]:
    """The training that a script in `train/` defines.

    Raises:
        UserError: no such file, or it trains on pictures alone.
    """
    kind = load_use_case(script)
    if not issubclass(kind, DiffusionTraining):
        raise UserError(f"{script} trains on pictures themselves: no frozen network makes what could be cached")
    return kind


def preview(kind: type[DiffusionTraining], given: argparse.Namespace) -> None:
    """Write the sheet of `--preview`."""
    try:
        count, path = positive(given.preview[0], MAX_SAMPLES), local_path(given.preview[1])
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--preview: {error}") from None
    if path.suffix != ".png":
        raise UserError(f"--preview: {path} is no name of a PNG file; write {path}.png")
    check_new([path], "name another file")
    if (origin := Origin.read(str(given.out.absolute()))) is None:
        raise UserError(f"{given.out} holds no cache ({CACHE_NAME}), of which there could be a preview")
    of_pictures = ["crop_mode" in settings for settings in origin.features.values()]
    if not any(of_pictures):
        raise UserError(f"{given.out} holds nothing that was made of pictures: name a cache of latents")
    source = f"webdataset_path={json.dumps([str(given.out.absolute())])}"
    others = ["caches=[]", "validation_path=null", "validation_caches=[]", "validation_samples=0"]
    config = load_config(kind.Config, [given.config, *given.settings, source, *others])
    held = "latents" if all(of_pictures) else "all"
    with only_parts(*PIPELINE_PARTS[held]):
        training = kind(without_idle_weights(kind, config.for_any_processes(), held))
        training.arguments = [given.config, *given.settings]
        print("\n".join(write_preview(training, count, path)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "script", type=local_path, metavar="SCRIPT", help="the training script, such as train/train_c.py"
    )
    parser.add_argument("config", metavar="CONFIG", help="its config, which names data, networks, sizes")
    parser.add_argument("out", type=local_path, metavar="OUT", help="folder for the cache")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="other values of the config")
    kinds = ", ".join(f"{name}: {what}" for name, what in KINDS.items())
    parser.add_argument("--features", choices=KINDS, default="all", help=f"{kinds}; default all")
    parser.add_argument(
        "--variants", type=positive, default=1, help="crops of each picture, clips of each video; default 1"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float16", help="default float16")
    parser.add_argument(
        "--batch-size", type=positive,
        help=f"samples encoded together; by default {BATCH_SIZE} pictures, or clips of {BATCH_FRAMES} frames together",
    )  # fmt: skip
    parser.add_argument(
        "--preview", nargs=2, metavar=("N", "PNG"), help="decode N samples of the cache OUT, to look at, and end"
    )
    given = parser.parse_intermixed_args(arguments)
    kind = use_case(given.script)
    if given.preview:
        preview(kind, given)
        return
    config, out = load_config(kind.Config, [given.config, *given.settings]), given.out.absolute()
    with ExitStack() as using:
        using.enter_context(only_parts(*PIPELINE_PARTS[given.features]))
        training = kind(without_idle_weights(kind, config.for_any_processes(), given.features))
        training.arguments = [given.config, *given.settings]
        batch_size = given.batch_size or default_batch_size(config)
        caching = Caching(training, out, given.dtype, given.variants, batch_size, given.features)
        using.enter_context(closing(caching))
        record = caching.run()
        if caching.training.processes.is_main:
            waits = caching.waits() if given.features == "all" else None
            print(report(record, given.dtype, given.variants, waits))
            used = f"webdataset_path={given.out}" if given.features == "all" else f"caches={given.out}"
            print(f"train from it with {used}")


if __name__ == "__main__":
    run_script(main, tell_once)
