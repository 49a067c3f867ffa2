"""Caches: what frozen networks make of the samples, made once by `tools/cache.py`, read by every training script.

A cache is a folder of tars that mirror those of the data, row by row and name by name, so that a run draws the same
samples in the same order from either. One may hold what is made of pictures, what is made of captions, or both.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from families.common.cache_commands import SOURCES, cache_command, kind_of
from families.common.cache_freshness import MadeFrom
from families.common.cached_captions import with_token_ids
from families.common.features import CACHE_NAME, Dtype, Feature, Origin, members_of
from families.common.file_hashes import sha256_of
from families.common.weight_source import OnlyOnHubError, hub_name, without_downloads
from warpcore.config import ConfigError
from warpcore.data.fields import TensorField
from warpcore.data.joined import FurtherTars
from warpcore.data.lanes import BucketChoice
from warpcore.data.shards import folders_named_whole, named_folders
from warpcore.data.storage import is_remote
from warpcore.safe_json import parse_json

Shape = tuple[int | None, ...]
"""Of a sample's feature; None where a side may have any size."""


class Cacheable(Protocol):
    """What a training tells of its features, so that a cache can be made for it, or compared with it."""

    config: Any
    bucket_factor: int
    features: Mapping[str, Feature]
    network_keys: Mapping[str, str]
    """The config keys that name the weights of networks which make features."""

    drawn_with: Collection[str]
    """Networks that are needed whatever is cached."""

    def local_files(self, network: str) -> list[Path]:
        """The weights of a network that makes features; empty where the config names none, so that a cache may be of
        any. Raises UserError where they are missing, OnlyOnHubError where they may not be downloaded."""

    def network_precision(self, network: str) -> str | None:
        """What a network that makes features is kept in, whatever the run computes in; None where it follows that."""

    def feature_setting(self, name: str) -> Any:
        """A setting that features depend on, as JSON holds it: that of the config unless the family knows better."""

    def read_shape(self, name: str) -> Shape | None:
        """The shape of a sample's feature that the network reads which is trained; None where anything fits."""

    def check_cacheable(self) -> None:
        """Raise UserError where this configuration can't train without pictures."""


def origin_of(
    training: Cacheable,
    names: Collection[str],
    dtype: Dtype = "float32",
    variants: int = 1,
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    downloads: bool = True,
) -> Origin:
    """What a cache of these features would be made with. Reads the files of the networks.

    downloads: the weights of a network that may have nothing to do are downloaded where they are only on the hub;
        otherwise its hash stays unknown then.

    Raises:
        UserError: weights are missing.
    """
    config, features = training.config, {name: training.features[name] for name in names}
    makers = {feature.network: None for feature in features.values()}
    settings = dict.fromkeys(name for feature in features.values() for name in feature.settings)
    values = {
        name: buckets_of(training).sizes if name == "bucket_sizes" else training.feature_setting(name)
        for name in settings
    }
    return Origin(
        features={name: list(feature.settings) for name, feature in features.items()},
        makers={name: feature.network for name, feature in features.items()},
        networks={name: _about_network(training, name, downloads) for name in makers},
        settings=parse_json(json.dumps(values)),
        dtype=dtype,
        variants=variants,
        seed=config.seed,
        shapes={name: {bucket: list(shape) for bucket, shape in one.items()} for name, one in (shapes or {}).items()},
        variable_length=[name for name, feature in features.items() if feature.variable_length],
        source=config.webdataset_path,
    )


def _about_network(training: Cacheable, name: str, downloads: bool) -> dict[str, str]:
    """Its `file`, its `hub` name where it has one, the `sha256` where its files are here, and its own `precision`."""
    try:
        with nullcontext() if downloads or name in training.drawn_with else without_downloads():
            paths = training.local_files(name)
        if not paths:  # the config names none
            return {}
        of_hub = hub_name(paths[0])
        about = {"file": paths[0].name, "sha256": sha256_of(paths)} | ({"hub": of_hub} if of_hub else {})
    except OnlyOnHubError as error:
        about = {"file": error.name, "hub": error.name}
    precision = training.network_precision(name)
    return about | ({} if precision is None else {"precision": precision})


@dataclass(frozen=True)
class Caches:
    """The caches that a run reads features from."""

    origins: dict[str, Origin]
    """What the cache of each feature was made with."""
    folders: dict[str, str]
    """The folder, a complete URL, from which each feature of the training data is read."""
    further: dict[str, list[FurtherTars]] = field(default_factory=dict)
    """Of those folders, the ones that hold features of the samples which the keys `webdataset_path` and
    `validation_path` name, beside these."""
    made_from: dict[str, dict[str, MadeFrom]] = field(default_factory=dict)
    """What the folders were made from, by these keys."""
    not_compared: list[str] = field(default_factory=list)
    """What to tell of networks whose weights could not be compared with those that a cache was made with."""

    def __contains__(self, name: str) -> bool:
        return name in self.origins

    def fields(self) -> dict[str, TensorField]:
        """How the loader reads the features, by their names in `Batch.extra`."""
        return {key: one for name, origin in self.origins.items() for key, one in origin.fields([name]).items()}


def find_caches(training: Cacheable) -> Caches | None:
    """The caches that the config of a training names; None where it names pictures alone.

    Raises:
        UserError: a cache was made with other networks or settings, or does not fit the others.
    """
    named = {key: _Named.of(training, key) for key in SOURCES if getattr(training.config, key) is not None}
    _check_kind(named)
    found = {key: _used(training, one) for key, one in named.items() if one.own or one.further}
    if not found:
        return None
    data = found.get("webdataset_path", Caches({}, {}))
    if "validation_path" in named:
        _check_alike(training, data, found.get("validation_path", Caches({}, {})))
    if any(training.features[name].of_picture for name in data.origins):
        training.check_cacheable()
    further = {key: one.further[key] for key, one in found.items()}
    made_from = {key: one.made_from[key] for key, one in found.items()}
    notes = dict.fromkeys(note for one in found.values() for note in one.not_compared)
    return Caches(data.origins, data.folders, further, made_from, [*notes])


@dataclass(frozen=True)
class _Named:
    """The folders that a key of data names, and the caches beside them, each with what it was made with."""

    key: str
    own: dict[str, Origin]
    pictures: list[str]
    """The named folders that hold no cache."""
    further: dict[str, Origin]

    @classmethod
    def of(cls, training: Cacheable, key: str) -> Self:
        folders = named_folders(getattr(training.config, key), key)
        caches = SOURCES[key]
        named = [folder for entry in getattr(training.config, caches) for folder in named_folders(entry, caches)]
        known = {
            folder: Origin.read(folder, f"make another: {cache_command(training, f'{folder}_new', data_key=key)}")
            for folder in dict.fromkeys([*folders, *named])
        }
        for folder in named:
            if known[folder] is None:
                command = cache_command(training, folder, data_key=key)
                raise ConfigError(f"{SOURCES[key]}: {folder} holds no cache ({CACHE_NAME}). Make it: {command}")
        # The one that holds the samples themselves is read as such.
        beside = [one for one in named if not any(f"{folder}/".startswith(f"{one}/") for folder in folders)]
        own = {folder: known[folder] for folder in folders if known[folder] is not None}
        pictures = [folder for folder in folders if folder not in own]
        return cls(key, own, pictures, {folder: known[folder] for folder in beside})


def _check_kind(named: Mapping[str, _Named]) -> None:
    caches = [folder for one in named.values() for folder in one.own]
    pictures = [folder for one in named.values() for folder in one.pictures]
    if caches and pictures:
        raise ConfigError(
            f"webdataset_path, validation_path: {caches[0]} is a cache, but {pictures[0]} is none (it holds no "
            f"{CACHE_NAME}): name caches or pictures, not both. Caches of pictures that are named here go into "
            "caches, or into validation_caches"
        )


def _used(training: Cacheable, named: _Named) -> Caches:
    """What a run reads from the caches of the data of one key."""
    features, every = training.features, named.own | named.further
    held = {folder: [name for name in features if name in origin.features] for folder, origin in every.items()}
    for folder in named.further:
        if not held[folder]:
            has = f"{folder} holds {', '.join(every[folder].features)}"
            raise ConfigError(f"{SOURCES[named.key]}: {has}, but this run reads {', '.join(features)}: leave it out")
    kinds = {folder: {features[name].of_picture for name in names} for folder, names in held.items()}
    of_own = set().union(*(kinds[folder] for folder in named.own))
    if named.own and not any(True in kind for kind in kinds.values()):
        of_own.add(True)  # there are no pictures to make them from
    made_from = {
        folder: MadeFrom(origin.source, _command_to_update(training, named.key, folder, origin))
        for folder, origin in every.items()
    }
    whole = [*named.own] == folders_named_whole(getattr(training.config, named.key), named.key)
    remedy_of_own = made_from[next(iter(named.own))].remedy if named.own and whole else None
    origins, folders, further, notes = {}, {}, [], []
    for folder, origin in every.items():
        kind = of_own if folder in named.own else kinds[folder]
        names = [name for name, feature in features.items() if feature.of_picture in kind]
        notes += _check(training, named.key, folder, origin, names)
        for name in names:
            other = folders.setdefault(name, folder)
            if folder in named.further and other != folder:
                raise ConfigError(f"{other} and {folder} both hold {name}: name one of them alone")
            _check_stored_alike(training, named.key, name, (other, origins.setdefault(name, origin)), (folder, origin))
        if folder in named.further:
            members = members_of(origin, names)
            further.append(FurtherTars(folder, members, made_from[folder].remedy, remedy_of_own))
    return Caches(origins, folders, {named.key: further}, {named.key: made_from}, notes)


def _command_to_update(training: Cacheable, key: str, folder: str, origin: Origin) -> str:
    """The command that brings a cache, of which the folder may be a part, up to date."""
    while not is_remote(folder) and Origin.read(above := folder.rpartition("/")[0]) == origin:
        folder = above
    return cache_command(training, folder, _kind_of(training, origin), origin, key)


def command_for_another(training: Cacheable, folder: str, origin: Origin, key: str = "webdataset_path") -> str:
    """The command that makes a cache like one that is there, but for its faults, beside it."""
    return cache_command(training, f"{folder}_new", _kind_of(training, origin), origin, key)


def _kind_of(training: Cacheable, origin: Origin) -> str:
    return kind_of(training.features[name] for name in origin.features if name in training.features)


def _check(training: Cacheable, key: str, folder: str, origin: Origin, names: Sequence[str]) -> list[str]:
    """Raise ConfigError where a cache can't be used for these features; returns what could not be compared."""
    here = origin_of(training, names, downloads=False)
    if not all(training.features[name].of_picture for name in names):
        origin = with_token_ids(origin, folder, here, training.config.captions_getter)
    kind = kind_of(training.features[name] for name in names)
    if wrong := origin.differences(here, names):
        raise ConfigError(
            f"{folder} is a cache that this run can't use: {'; '.join(wrong)}. Write into the config what the cache "
            f"was made with, or make another: {cache_command(training, f'{folder}_new', kind, origin, key)}"
        )
    for name in names:
        _check_shape(training, folder, origin, name, kind, key)
    return [
        _not_compared(folder, origin, here, name)
        for name, one in here.networks.items()
        if "sha256" not in one and name in origin.networks
    ]


def _not_compared(folder: str, origin: Origin, here: Origin, network: str) -> str:
    made, own = origin.networks[network], here.networks[network].get("hub")
    if own is None:
        why = "this config names no weights"
    elif own == made.get("hub"):
        why = f"they are of {own} by name, and what has that name on the hub is not on this machine"
    else:
        why = f"{own} is not on this machine"
    return (
        f"{folder}: that it was made with the same weights of the {network} network was not checked: {why} (in the "
        f"cache: {made.get('hub') or made['file']}, SHA-256 {made['sha256'][:12]}...)"
    )


def _check_shape(training: Cacheable, folder: str, origin: Origin, name: str, kind: str, key: str) -> None:
    """Raise ConfigError where a cached feature has another shape than the network reads."""
    wanted = training.read_shape(name)
    for shape in origin.shapes.get(name, {}).values():
        if wanted is None or (len(shape) == len(wanted) and all(map(_fits, shape, wanted))):
            continue
        has, reads = (" x ".join("any" if n is None else str(n) for n in one) for one in (shape, wanted))
        network = training.features[name].network
        made_by = origin.networks.get(network, {}).get("file", "unknown weights")
        own_key = training.network_keys.get(network, network)
        raise ConfigError(
            f"{folder} is a cache that this run can't use: {name} of a sample has the shape {has} there, made with "
            f"{made_by}, and the network that is trained reads {reads}. Name the weights that it was trained with "
            f"({own_key}), and make another: {cache_command(training, f'{folder}_new', kind, origin, key)}"
        )


def _fits(size: int, wanted: int | None) -> bool:
    return wanted in (None, size)


def _check_stored_alike(
    training: Cacheable, key: str, name: str, one: tuple[str, Origin], other: tuple[str, Origin]
) -> None:
    """Raise ConfigError where two caches, given as folder and origin, store a feature differently.

    key: of the data whose features the other one holds.
    """
    by_bucket = [made.shapes.get(name, {}) for _, made in (one, other)]
    if not training.features[name].of_picture:  # its shape is the same in every bucket
        by_bucket = [list(shapes.values())[:1] for shapes in by_bucket]
    stored = [
        {"dtype": made.dtype, "variants": made.variants, "shapes": shapes}
        for (_, made), shapes in zip((one, other), by_bucket, strict=True)
    ]
    if wrong := [what for what in stored[0] if stored[0][what] != stored[1][what]]:
        differences = "; ".join(f"{what}: {stored[0][what]} and {stored[1][what]}" for what in wrong)
        like_the_first = replace(other[1], dtype=one[1].dtype, variants=one[1].variants)
        command = command_for_another(training, other[0], like_the_first, key)
        raise ConfigError(
            f"{one[0]} and {other[0]} store {name} differently ({differences}). Make another {other[0]}: {command}"
        )


def _check_alike(training: Cacheable, data: Caches, held_out: Caches) -> None:
    """Raise ConfigError where validation samples have other cached features than those of the training data."""
    for name in training.features:
        if (name in data) != (name in held_out):
            lacking = "validation_path" if name in data else "webdataset_path"
            kind, folder = kind_of([training.features[name]]), f"{(data if name in data else held_out).folders[name]}"
            command = cache_command(training, f"{folder}_of_{lacking.split('_')[0]}", kind, data_key=lacking)
            raise ConfigError(
                f"{lacking}: its samples need a cache of {name}, as those of the other data have one. Name it in "
                f"{SOURCES[lacking]}; this makes it: {command}"
            )
        if name in data:
            pair = [(one.folders[name], one.origins[name]) for one in (data, held_out)]
            _check_stored_alike(training, "validation_path", name, *pair)


def buckets_of(training: Cacheable) -> BucketChoice:
    """The sizes of pictures or clips that a training has."""
    return training.config.buckets(training.bucket_factor)
