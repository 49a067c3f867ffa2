"""Caches: what frozen networks make of the samples, made once by `tools/cache.py`, read by every training script.

A cache is a folder of tars that mirror those of the pictures, row by row and name by name, so that a run draws the
same samples in the same order from either.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from families.common.cached_captions import with_token_ids
from families.common.features import CACHE_NAME, REMAKE, Dtype, Feature, Origin
from families.common.file_hashes import sha256
from warpcore.config import ConfigError
from warpcore.data.buckets import Buckets
from warpcore.data.shards import named_folders


class Cacheable(Protocol):
    """What a training tells of its features, so that a cache can be made for it, or compared with it."""

    config: Any
    bucket_factor: int
    features: Mapping[str, Feature]

    def network_file(self, network: str) -> Path:
        """The weights of a network that makes features. Raises UserError where they are missing."""

    def feature_setting(self, name: str) -> Any:
        """A setting that features depend on, as JSON holds it: that of the config unless the family knows better."""

    def check_cacheable(self) -> None:
        """Raise UserError where this configuration can't train from a cache."""


def origin_of(
    training: Cacheable,
    dtype: Dtype = "float32",
    variants: int = 1,
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Origin:
    """What a cache for a training would be made with. Reads the files of the networks.

    Raises:
        UserError: weights are missing.
    """
    config, features = training.config, training.features
    networks = {name: training.network_file(name) for name in {feature.network: None for feature in features.values()}}
    names = dict.fromkeys(name for feature in features.values() for name in feature.settings)
    values = {
        name: buckets_of(training).sizes if name == "bucket_sizes" else training.feature_setting(name)
        for name in names
    }
    return Origin(
        features={name: list(feature.settings) for name, feature in features.items()},
        makers={name: feature.network for name, feature in features.items()},
        networks={name: {"file": path.name, "sha256": sha256(path)} for name, path in networks.items()},
        settings=json.loads(json.dumps(values)),
        dtype=dtype,
        variants=variants,
        seed=config.seed,
        shapes={name: {bucket: list(shape) for bucket, shape in one.items()} for name, one in (shapes or {}).items()},
    )


def find_cache(training: Cacheable) -> Origin | None:
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
            raise ConfigError(f"{folder} and {next(iter(caches))} differ in dtype, variants or shapes: {REMAKE}")
    return first


def buckets_of(training: Cacheable) -> Buckets:
    """The picture sizes that a training has."""
    config = training.config
    return Buckets.for_image_size(config.image_size, config.multi_aspect_ratio or [], training.bucket_factor)
