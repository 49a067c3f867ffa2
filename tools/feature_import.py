"""Features that another program stored become a cache that a training reads: files beside pictures, or records.

Nothing in them says which networks made them: the config of the training has to name these.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from families.common.cache import buckets_of, origin_of
from families.common.features import Dtype, Origin
from families.common.imported import ImportedRecord
from families.common.training import DiffusionTraining
from families.common.weight_source import only_parts
from families.registry import family_called
from modules.safetensors_files import MAX_HEADER_BYTES
from tools.cache import use_case
from tools.cache_features import PIPELINE_PARTS, as_if_cached
from tools.picture_folder import Entry, find_entries
from tools.picture_sample import Unusable, load_again
from tools.shard_writer import ASIDE, Packing, ShardWriter, check_free, reserved, sample_bytes, swap
from warpcore.config import load_config
from warpcore.data.catalog import write_manifests
from warpcore.data.frames import frames_needed
from warpcore.data.images import place
from warpcore.data.lanes import bucket_name
from warpcore.data.picture_files import LeftOut
from warpcore.data.samples import PICTURE_FACTS
from warpcore.data.storage import local_path
from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.random import stable_hash
from warpcore.text import counted

MAX_BYTES = 2**28
"""Of a file of features: far more than those of a picture or of a text have."""
Features = dict[str, Tensor]
"""Of a sample, without a batch dimension, by name."""
Members = dict[str, bytes]
Load = Callable[[], tuple[Features, Members]]
"""Gives the features of a sample, and what else a tar has of it. Raises Unusable."""


class Importing:
    """Features of another program that become a cache for a training, whose config says what they have to be.

    Raises:
        UserError: the config crops otherwise than their makers.
    """

    dtype: Dtype = "float32"
    """In which they are stored: what was read, unchanged."""
    noun = "picture"
    """What a sample is called."""

    def __init__(self, training: DiffusionTraining):
        self.training, crop = training, training.config.crop_mode
        if crop != "center":
            raise UserError(f"crop_mode is {crop}, but these features are of centre crops: crop_mode=center")
        self.family, self.buckets = family_called(training.family), buckets_of(training)
        self.expected: dict[str, Origin] = as_if_cached(type(training), training.config).caches.origins
        self.changed: Counter[str] = Counter()

    @classmethod
    def by(cls, arguments: Sequence[str], out: Path, *further: Any) -> Self:
        """For the training that arguments name: its script, its config, and keys; `out` is its data."""
        script, *config = arguments
        kind = use_case(local_path(script))
        given = [*config, f"webdataset_path={json.dumps([str(out)])}"]
        with only_parts(*PIPELINE_PARTS["all"]):
            training = kind(load_config(kind.Config, given).for_any_processes())
            training.settle_features(None)
        return cls(training, *further)

    def write(
        self, out: Path, samples: Iterable[tuple[str, Path, Load]], packing: Packing, left_out: LeftOut, nothing: str
    ) -> list[str]:
        """Write the cache of samples, each with its key and where it is from; what was done, as lines.

        nothing: the error message where no sample is usable.

        Raises:
            UserError: that, or the config names no network for a feature.
        """
        shards, names, kept, without_caption = {}, [], 0, 0
        with ExitStack() as until_done:
            until_done.enter_context(reserved(out / ASIDE))
            writer = None
            for key, where, load_sample in samples:
                try:
                    features, members = load_sample()
                except Unusable as reason:
                    left_out.add(str(reason), where)
                    continue
                self._check_networks(features, where)
                names = names or list(features)
                if names != list(features):
                    had, others = ", ".join(features), ", ".join(names)
                    left_out.add(f"files with {had}, those before it {others}", where)
                    continue
                kept, without_caption = kept + 1, without_caption + ("txt" not in members)
                members |= {f"{name}.npy": self._npy(values) for name, values in features.items()}
                writer = writer or ShardWriter(out / ASIDE, len(shards))
                writer.write(key, members)
                if packing.add(sample_bytes(key, {name: len(content) for name, content in members.items()})):
                    writer = _finish(writer, shards)
            if writer is not None:
                _finish(writer, shards)
            if not shards:
                raise UserError(f"{nothing}: {left_out}")
            shapes = {name: self.expected[name].shapes[name] for name in names}
            origin_of(self.training, names, self.dtype, shapes=shapes).write(out / ASIDE)
            write_manifests(list(shards), {shard.url: summary for shard, summary in shards.items()})
            swap(out / ASIDE)
        told = [f"imported {', '.join(names)} of {counted(kept, self.noun)} in {counted(len(shards), 'tar')}"]
        if without_caption:
            told.append(f"  no caption: {without_caption}; training with captions from .txt leaves them out")
        told += [f"  {how} to the length that the config has: {counted(n, 'text')}" for how, n in self.changed.items()]
        return [*told, str(left_out), f"train from it with webdataset_path={out}"]

    def _npy(self, values: Tensor) -> bytes:
        content = io.BytesIO()
        np.save(content, values.to(getattr(torch, self.dtype)).numpy())
        return content.getvalue()

    def _fitted(self, name: str, values: Tensor, size: tuple[int, ...]) -> Tensor:
        """A feature in the shape that it has for the bucket `size` ([frames,] H, W): texts are filled up with zeros,
        or cut, as the other trainer does it. Raises Unusable where the shape is another.
        """
        if name not in self.expected:
            raise Unusable(f"{name}, which this training does not read: it reads {', '.join(self.expected)}")
        origin = self.expected[name]
        wanted, found = list(origin.shapes[name][bucket_name(size)]), list(values.shape)
        missing, is_text = wanted[0] - found[0], not self.training.features[name].of_picture
        if found[1:] != wanted[1:] or (missing and not is_text):
            raise Unusable(f"its {name} are of shape {found}, where the config wants {wanted} for {_shown(size)}")
        if not values.isfinite().all():
            raise Unusable(f"its {name} hold numbers that are not finite")
        if not missing or (name in origin.variable_length and missing > 0):
            return values
        self.changed["filled up with zeros" if missing > 0 else "cut"] += 1
        return F.pad(values, (0, 0, 0, missing))

    def _check_complete(self, features: Features, where: str) -> None:
        """Raise Unusable where the training reads more of pictures, or of texts, than is there of one."""
        known = self.training.features
        kinds = {known[name].of_picture for name in features}
        if lacking := [name for name, one in known.items() if one.of_picture in kinds and name not in features]:
            raise Unusable(f"{where} lack {', '.join(lacking)}, which this training reads too")

    def _check_networks(self, features: Features, where: Path) -> None:
        """Raise UserError where the config names no network for a feature."""
        known, config = self.training.features, self.training.config
        for network in dict.fromkeys(known[name].network for name in features):
            for key in self.training.keys_of_network(config, network):
                if getattr(config, key) is None:
                    raise UserError(
                        f"the features of {where} do not say which {network} network made them: name it, "
                        f"{key}=FILE or FOLDER"
                    )


class Imported(Importing):
    """Features out of files with these endings beside each picture."""

    def __init__(self, training: DiffusionTraining, suffixes: Sequence[str]):
        super().__init__(training)
        self.suffixes = suffixes

    def build(self, folder: Path, out: Path, packing: Packing, metadata: Path | None, overwrite: bool) -> str:
        """Write the cache; what became of the pictures, as a report.

        Raises:
            UserError: nothing is usable, the config names no network for a feature, or `out` holds something.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of pictures")
        check_free(out, overwrite)
        left_out, notes = LeftOut(), []
        entries = find_entries(folder, metadata, left_out, notes, out, others=self.suffixes)
        ordered = sorted(entries, key=lambda entry: stable_hash(entry.key))
        samples = ((one.key, one.picture.relative_to(folder), partial(self._sample, one)) for one in ordered)
        nothing = f"{folder} holds no picture with {', '.join(self.suffixes)} beside it"
        first, *lines = self.write(out, samples, packing, left_out, nothing)
        return "\n".join([first, *notes, *lines])

    def _sample(self, entry: Entry) -> tuple[Features, Members]:
        """See `Load`."""
        outcome = load_again(entry)
        if isinstance(outcome, Unusable):
            raise outcome
        (width, height), beside = outcome
        size = self.buckets.choose(width, height, 0)
        features: Features = {}
        for suffix in self.suffixes:
            found = self._read(entry.picture.with_suffix(suffix), suffix)
            if twice := sorted(found.keys() & features.keys()):
                raise Unusable(f"its {suffix} holds {twice[0]}, as another of its files does")
            features |= found
        features = {name: self._fitted(name, values, size) for name, values in features.items()}
        self._check_complete(features, f"its {', '.join(self.suffixes)}")
        crop = place((height, width), size)
        facts = {"width": width, "height": height, "crops": [[crop.top, crop.left]]}
        members = {PICTURE_FACTS: json.dumps(facts).encode()}
        return features, members | {name: beside[name] for name in ("txt", "json") if name in beside}

    def _read(self, path: Path, suffix: str) -> Features:
        if not path.is_file():
            raise Unusable(f"no {suffix} beside it")
        with open_to_read(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise Unusable(f"its {suffix} has more than {MAX_BYTES >> 20} MiB")
        if int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
            raise Unusable(f"its {suffix} is no whole safetensors file")
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, RuntimeError, AssertionError):  # such as a dtype that PyTorch lacks
            raise Unusable(f"its {suffix} is no whole safetensors file") from None
        try:
            return self.family.imported_features(tensors)
        except ValueError as error:
            raise Unusable(f"its {suffix} {error}") from None


class ImportedRecords(Importing):
    """Features out of a folder of records, as the family knows them."""

    dtype = "float16"
    noun = "record"

    def __init__(self, training: DiffusionTraining):
        super().__init__(training)
        self.not_taken: Counter[str] = Counter()

    def build(self, folder: Path, out: Path, packing: Packing, overwrite: bool) -> str:
        """Write the cache; what became of the records, as a report.

        Raises:
            UserError: the folder is damaged or holds other features, nothing is usable, the config names no network
                for a feature, or `out` holds something.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of records")
        check_free(out, overwrite)
        nothing = f"{folder} holds no record that can be used"
        first, *lines = self.write(out, self._samples(folder), packing, LeftOut(), nothing)
        not_taken = [f"  not taken, as nothing here reads it: {what} of {counted(n, 'record')}"
                     for what, n in self.not_taken.items()]  # fmt: skip
        return "\n".join([first, *not_taken, *lines])

    def _samples(self, folder: Path) -> Iterator[tuple[str, Path, Load]]:
        for number, record in enumerate(self.family.imported_records(folder)):
            yield f"{number:08d}", Path(f"record {number}"), partial(self._sample, record)

    def _sample(self, record: ImportedRecord) -> tuple[Features, Members]:
        """See `Load`. What is made of pictures tells the bucket."""
        if record.problem:
            raise Unusable(record.problem)
        self.not_taken.update(record.not_taken)
        size = self._size({name: list(values.shape) for name, values in record.features.items()})
        features = {name: self._fitted(name, values, size) for name, values in record.features.items()}
        self._check_complete(features, "its features")
        return features, {PICTURE_FACTS: json.dumps(self._facts(size, record.fps)).encode()} | record.members

    def _size(self, found: Mapping[str, list[int]]) -> tuple[int, ...]:
        """The bucket whose features of pictures have these shapes; the first one where there is none."""
        known = self.training.features
        shapes = {name: self.expected[name].shapes[name] for name in found if name in known and known[name].of_picture}

        def fits(size: tuple[int, ...]) -> bool:
            return all(list(of_bucket[bucket_name(size)]) == found[name] for name, of_bucket in shapes.items())

        return next(filter(fits, self.buckets.sizes), self.buckets.sizes[0])

    def _facts(self, size: tuple[int, ...], fps: float) -> dict[str, Any]:
        """What stands for a picture or a video of which a bucket takes all."""
        facts = {"width": size[-1], "height": size[-2], "crops": [[0, 0]]}
        if len(size) == 2 or size[0] == 1:
            return facts
        config = self.training.config
        own = config.frame_rate or fps * config.frame_stride
        frames = int(frames_needed(size[0], own, config.frame_stride, config.frame_rate))
        return facts | {"num_frames": frames, "fps": own}


def _shown(size: tuple[int, ...]) -> str:
    """A bucket as a message says it."""
    *frames, height, width = size
    return "".join(f"{n} frames of " for n in frames if n > 1) + f"{width} x {height} px"


def _finish(writer: ShardWriter, shards: dict) -> None:
    writer.close()
    shard, summary = writer.indexed()
    shards[shard] = summary
