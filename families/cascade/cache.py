"""Caches: what frozen networks make of the samples, made once by `tools/cache.py`, read by every training script.

A cache is a folder of tars that mirror those of the pictures, row by row and name by name, so that a run draws the
same samples in the same order from either. `NAME.npy` members hold the results, here called features; `cache.json` in
every folder of tars says what they were made with.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from families.cascade import build
from families.cascade.cached_captions import with_token_ids
from warpcore.config import ConfigError
from warpcore.data.buckets import Buckets
from warpcore.data.lanes import parse_size
from warpcore.data.reader import Batch, TensorField
from warpcore.data.shards import named_folders
from warpcore.data.storage import storage_for
from warpcore.errors import UserError

if TYPE_CHECKING:
    from families.cascade.training import DiffusionTraining

CACHE_NAME = "cache.json"
CACHE_VERSION = 1
Dtype = Literal["float32", "bfloat16", "float16"]
CAPTION_SETTINGS = ("captions_getter", "token_ids")
PICTURE_SETTINGS = ("bucket_sizes", "crop_mode", "background")
_SAID_AS = {"bucket_sizes": "bucket_sizes (image_size, multi_aspect_ratio)"}


@dataclass(frozen=True)
class Feature:
    """One of the things that frozen networks make of a sample."""

    network: str
    """The one that makes it, or on whose results it depends, as `build.network_file` knows it."""
    settings: tuple[str, ...]
    """What of a configuration it depends on."""

    @property
    def of_picture(self) -> bool:
        """Whether each crop has its own."""
        return "crop_mode" in self.settings


@dataclass(frozen=True)
class Origin:
    """What a cache was made with: the content of its `cache.json`."""

    features: dict[str, list[str]]
    """The settings that each feature depends on."""
    makers: dict[str, str | None]
    """The network of each feature."""
    networks: dict[str, dict[str, str]]
    """File name and SHA-256 of each network's weights."""
    settings: dict[str, Any]
    """Those that the features depend on."""
    dtype: str
    """The precision in which features are stored."""
    variants: int
    """Crops of each picture."""
    seed: int
    """Of the crops."""
    shapes: dict[str, dict[str, list[int]]]
    """Of the features, by bucket."""
    version: int = CACHE_VERSION

    def write(self, folder: Path) -> None:
        """Write it into a folder of tars."""
        storage_for(str(folder)).write(f"{folder}/{CACHE_NAME}", f"{json.dumps(asdict(self), indent=1)}\n".encode())

    @classmethod
    def read(cls, folder: str) -> "Origin | None":
        """That of a folder, given as a complete URL; None where it holds no cache.

        Raises:
            UserError: it can't be read, or understood.
        """
        url = f"{folder}/{CACHE_NAME}"
        try:
            with storage_for(url).open(url) as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            values = json.loads(content)
        except ValueError as error:
            raise UserError(f"{url} is not whole: {error}; {_REMAKE}") from None
        if not isinstance(values, dict) or values.get("version") != CACHE_VERSION:
            raise UserError(f"{url} is not of version {CACHE_VERSION}; {_REMAKE}")
        return cls(**values)

    def fields(self, names: Collection[str]) -> dict[str, TensorField]:
        """How the loader reads these features of a sample, by their names in `Batch.extra`."""
        return {
            stored_name(name): TensorField(
                name,
                {parse_size(bucket): tuple(shape) for bucket, shape in self.shapes[name].items()},
                self.variants if "crop_mode" in self.features[name] else 1,
                self.dtype == "bfloat16",
            )
            for name in names
        }

    def differences(self, other: "Origin", names: Collection[str]) -> list[str]:
        """What that these features depend on differs from another cache or run, as a message."""
        found = [f"it has no {name}, but {', '.join(self.features)}" for name in names if name not in self.features]
        known = [name for name in names if name in self.features]
        for setting in dict.fromkeys(setting for name in known for setting in other.features[name]):
            here, there = self.settings.get(setting), other.settings[setting]
            if here != there:
                found.append(f"{_SAID_AS.get(setting, setting)} is {here!r} in the cache, {there!r} here")
        for network in dict.fromkeys(other.makers[name] for name in known):
            here, there = self.networks.get(network), other.networks[network]
            if here is None:
                found.append(f"the cache does not say which weights the {network} network had")
            elif here["sha256"] != there["sha256"]:
                files = [f"{one['file']} (SHA-256 {one['sha256'][:12]}...)" for one in (here, there)]
                found.append(f"the weights of the {network} network are {files[0]} in the cache, {files[1]} here")
        return found


_REMAKE = "recreate the cache with tools/cache.py"


def origin_of(
    training: "DiffusionTraining",
    dtype: Dtype = "float32",
    variants: int = 1,
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Origin:
    """What a cache for a training would be made with. Reads the files of the networks.

    Raises:
        UserError: weights are missing.
    """
    config, features = training.config, training.features
    networks = {feature.network: build.network_file(config, feature.network)
                for feature in features.values()}  # fmt: skip
    names = dict.fromkeys(name for feature in features.values() for name in feature.settings)
    values = {"bucket_sizes": buckets_of(training).sizes}
    if "token_ids" in names:
        values["token_ids"] = build.text_tokenizer(config, training.kept["tokenizer"]).name
    return Origin(
        features={name: list(feature.settings) for name, feature in features.items()},
        makers={name: feature.network for name, feature in features.items()},
        networks={name: {"file": path.name, "sha256": sha256(path)} for name, path in networks.items()},
        settings={name: json.loads(json.dumps(values.get(name, getattr(config, name, None)))) for name in names},
        dtype=dtype,
        variants=variants,
        seed=config.seed,
        shapes={name: {bucket: list(shape) for bucket, shape in one.items()} for name, one in (shapes or {}).items()},
    )


def find_cache(training: "DiffusionTraining") -> Origin | None:
    """The cache that a training's `webdataset_path` names, None where it names pictures.

    Raises:
        UserError: the cache was made with other networks or settings, or not all of the data are of one.
    """
    paths = (training.config.webdataset_path, training.config.validation_path)
    found = {folder: Origin.read(folder) for path in paths if path is not None for folder in named_folders(path)}
    caches = {folder: origin for folder, origin in found.items() if origin is not None}
    if not caches:
        return None
    if len(caches) < len(found):
        pictures = next(folder for folder, origin in found.items() if origin is None)
        raise ConfigError(
            f"webdataset_path, validation_path: {next(iter(caches))} is a cache, but {pictures} is none (it holds no "
            f"{CACHE_NAME}): name caches or pictures, not both"
        )
    training.check_cacheable()
    here, first = origin_of(training), next(iter(caches.values()))
    for folder, origin in caches.items():
        origin = with_token_ids(origin, folder, here, training.config.captions_getter)
        wrong = origin.differences(here, training.features)
        if wrong:
            raise ConfigError(
                f"{folder} is a cache that this run can't use: {'; '.join(wrong)}. Write into the config what the "
                "cache was made with, or make another: python3 tools/cache.py SCRIPT CONFIG OUT"
            )
        if (origin.dtype, origin.variants, origin.shapes) != (first.dtype, first.variants, first.shapes):
            raise ConfigError(f"{folder} and {next(iter(caches))} differ in dtype, variants or shapes: {_REMAKE}")
    return first


def buckets_of(training: "DiffusionTraining") -> Buckets:
    """The picture sizes that a training has."""
    config = training.config
    return Buckets.for_image_size(config.image_size, config.multi_aspect_ratio or [], training.bucket_factor)


def stored(batch: Batch, name: str) -> Tensor | list[Tensor] | None:
    """A feature of every sample of a batch that was read from a cache, else None.

    (B, ...), or a list of B where the sizes differ; in the precision in which it is stored.
    """
    return batch.extra.get(stored_name(name))


def stored_name(name: str) -> str:
    """The name of a feature in `Batch.extra`."""
    return f"{name}.npy"


def sha256(path: Path) -> str:
    """Of a file's content, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bucket_name(size: tuple[int, int]) -> str:
    """A bucket (H, W) as text, as `parse_size` reads it."""
    return f"{size[0]}x{size[1]}"
