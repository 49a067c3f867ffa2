"""Features that another program stored beside pictures, one file for each, become a cache that a training reads.

Nothing in such files says which networks made them: the config of the training has to name these.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from families.common.cache import buckets_of, origin_of
from families.common.features import Origin
from families.common.training import DiffusionTraining
from families.common.weight_source import only_parts
from families.registry import family_called
from modules.safetensors_files import MAX_HEADER_BYTES
from tools.arguments import local_path
from tools.cache import use_case
from tools.cache_features import PIPELINE_PARTS, as_if_cached
from tools.picture_folder import Entry, find_entries
from tools.picture_sample import Unusable, load_again
from tools.shard_writer import ASIDE, Packing, ShardWriter, check_free, reserved, sample_bytes, swap
from warpcore.config import load_config
from warpcore.data.catalog import write_manifests
from warpcore.data.images import place
from warpcore.data.picture_files import LeftOut
from warpcore.data.samples import PICTURE_FACTS
from warpcore.errors import UserError
from warpcore.files import open_to_read
from warpcore.random import stable_hash
from warpcore.text import counted

MAX_BYTES = 2**28
"""Of a file of features: far more than those of a picture or of a text have."""
DTYPE = "float32"
"""In which they are stored: what was read, unchanged."""


class Imported:
    """Features that a training reads, out of files with these endings beside each picture.

    Raises:
        UserError: the config crops otherwise than the files' makers, or its family reads no such files.
    """

    def __init__(self, training: DiffusionTraining, suffixes: Sequence[str]):
        self.training, self.suffixes, config = training, suffixes, training.config
        if config.crop_mode != "center":
            raise UserError(
                f"crop_mode is {config.crop_mode}, but these features are of centre crops: crop_mode=center"
            )
        self.family = family_called(training.family)
        cached = as_if_cached(type(training), config).caches
        self.expected: dict[str, Origin] = cached.origins
        self.buckets = buckets_of(training)
        self.changed: Counter[str] = Counter()

    @classmethod
    def by(cls, arguments: Sequence[str], suffixes: Sequence[str], out: Path) -> Self:
        """For the training that arguments name: its script, its config, and keys; `out` is its data."""
        script, *config = arguments
        kind = use_case(local_path(script))
        given = [*config, f"webdataset_path={json.dumps([str(out)])}"]
        with only_parts(*PIPELINE_PARTS["all"]):
            training = kind(load_config(kind.Config, given))
            training.settle_features(None)
        return cls(training, suffixes)

    def build(self, folder: Path, out: Path, packing: Packing, metadata: Path | None, overwrite: bool) -> str:
        """Write the cache; what became of the pictures, as a report.

        Raises:
            UserError: nothing is usable, the config names no network for a feature, or `out` holds something.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of pictures")
        check_free(out, overwrite)
        left_out, notes, shards, names = LeftOut(), [], {}, []
        entries = find_entries(folder, metadata, left_out, notes, out, others=self.suffixes)
        kept = without_caption = 0
        with ExitStack() as until_done:
            until_done.enter_context(reserved(out / ASIDE))
            writer = None
            for entry in sorted(entries, key=lambda entry: stable_hash(entry.key)):
                try:
                    features, members = self._sample(entry)
                except Unusable as reason:
                    left_out.add(str(reason), entry.picture.relative_to(folder))
                    continue
                self._check_networks(features, entry.picture)
                names = names or list(features)
                if names != list(features):
                    had, others = ", ".join(features), ", ".join(names)
                    left_out.add(f"files with {had}, those before it {others}", entry.picture.relative_to(folder))
                    continue
                kept, without_caption = kept + 1, without_caption + ("txt" not in members)
                writer = writer or ShardWriter(out / ASIDE, len(shards))
                writer.write(entry.key, members)
                if packing.add(sample_bytes(entry.key, {name: len(content) for name, content in members.items()})):
                    writer = _finish(writer, shards)
            if writer is not None:
                _finish(writer, shards)
            if not shards:
                raise UserError(f"{folder} holds no picture with {', '.join(self.suffixes)} beside it: {left_out}")
            shapes = {name: self.expected[name].shapes[name] for name in names}
            origin_of(self.training, names, DTYPE, shapes=shapes).write(out / ASIDE)
            write_manifests(list(shards), {shard.url: summary for shard, summary in shards.items()})
            swap(out / ASIDE)
        told = [f"imported {', '.join(names)} of {counted(kept, 'picture')} in {counted(len(shards), 'tar')}", *notes]
        if without_caption:
            told.append(f"  no caption: {without_caption}; training with captions from .txt leaves them out")
        told += [f"  {how} to the length that the config has: {counted(n, 'text')}" for how, n in self.changed.items()]
        return "\n".join([*told, str(left_out), f"train from it with webdataset_path={out}"])

    def _sample(self, entry: Entry) -> tuple[dict[str, Tensor], dict[str, bytes]]:
        """The features of a picture, and the members of its sample. Raises Unusable."""
        outcome = load_again(entry)
        if isinstance(outcome, Unusable):
            raise outcome
        (width, height), beside = outcome
        size = self.buckets.choose(width, height, 0)
        features: dict[str, Tensor] = {}
        for suffix in self.suffixes:
            found = self._read(entry.picture.with_suffix(suffix), suffix)
            if twice := sorted(found.keys() & features.keys()):
                raise Unusable(f"its {suffix} holds {twice[0]}, as another of its files does")
            features |= found
        features = {name: self._fitted(name, values, size) for name, values in features.items()}
        self._check_complete(features)
        crop = place((height, width), size)
        facts = {"width": width, "height": height, "crops": [[crop.top, crop.left]]}
        members = {PICTURE_FACTS: json.dumps(facts).encode()}
        members |= {name: content for name, content in beside.items() if name in ("txt", "json")}
        return features, members | {f"{name}.npy": _npy(values) for name, values in features.items()}

    def _read(self, path: Path, suffix: str) -> dict[str, Tensor]:
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

    def _fitted(self, name: str, values: Tensor, size: tuple[int, int]) -> Tensor:
        """A feature in the shape that it has for the bucket `size` (H, W): texts are filled up with zeros, or cut, as
        the other trainer does it. Raises Unusable where the shape is another.
        """
        if name not in self.expected:
            raise Unusable(f"{name}, which this training does not read: it reads {', '.join(self.expected)}")
        origin = self.expected[name]
        wanted, found = list(origin.shapes[name]["{}x{}".format(*size)]), list(values.shape)
        missing, is_text = wanted[0] - found[0], not self.training.features[name].of_picture
        if found[1:] != wanted[1:] or (missing and not is_text):
            raise Unusable(
                f"its {name} are of shape {found}, where the config wants {wanted} for {size[1]} x {size[0]} px"
            )
        if not values.isfinite().all():
            raise Unusable(f"its {name} hold numbers that are not finite")
        if not missing or (name in origin.variable_length and missing > 0):
            return values
        self.changed["filled up with zeros" if missing > 0 else "cut"] += 1
        return F.pad(values, (0, 0, 0, missing))

    def _check_complete(self, features: Mapping[str, Tensor]) -> None:
        """Raise Unusable where the training reads more of pictures, or of texts, than the files of one hold."""
        known = self.training.features
        kinds = {known[name].of_picture for name in features}
        if lacking := [name for name, one in known.items() if one.of_picture in kinds and name not in features]:
            raise Unusable(f"its {', '.join(self.suffixes)} lack {', '.join(lacking)}, which this training reads too")

    def _check_networks(self, features: Mapping[str, Tensor], picture: Path) -> None:
        """Raise UserError where the config names no network for a feature."""
        known, config = self.training.features, self.training.config
        for network in dict.fromkeys(known[name].network for name in features):
            for key in self.training.keys_of_network(config, network):
                if getattr(config, key) is None:
                    raise UserError(
                        f"the features of {picture} do not say which {network} network made them: name it, "
                        f"{key}=FILE or FOLDER"
                    )


def _finish(writer: ShardWriter, shards: dict) -> None:
    writer.close()
    shard, summary = writer.indexed()
    shards[shard] = summary


def _npy(values: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, values.float().numpy())
    return content.getvalue()
