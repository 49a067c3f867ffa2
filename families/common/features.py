"""Features: what frozen networks make of a sample, and what a cache of them was made with.

`NAME.npy` members of a cache's tars hold them; `cache.json` in every folder of tars says what they were made with.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from warpcore.data.fields import TensorField, variant_member
from warpcore.data.lanes import parse_size
from warpcore.data.reader import Batch
from warpcore.data.samples import PICTURE_FACTS
from warpcore.data.storage import storage_for
from warpcore.errors import UserError
from warpcore.safe_json import MAX_JSON_BYTES, parse_json

CACHE_NAME = "cache.json"
CACHE_VERSION = 1
MAX_VARIANTS = 100_000
"""Of crops; a cache that says that it has more is damaged."""
Dtype = Literal["float32", "bfloat16", "float16"]
CAPTION_SETTINGS = ("captions_getter", "token_ids")
PICTURE_SETTINGS = ("bucket_sizes", "crop_mode", "background")
DISPLAY_NAMES = {"bucket_sizes": "bucket_sizes (image_size, multi_aspect_ratio)"}


@dataclass(frozen=True)
class Feature:
    """One of the things that frozen networks make of a sample."""

    network: str
    """The one that makes it, or on whose results it depends, as `build.network_file` knows it."""
    settings: tuple[str, ...]
    """What of a configuration it depends on."""
    variable_length: bool = False
    """Whether samples differ in the size of the first dimension, such as the number of tokens of their captions: see
    `lengths_name`. A cache holds each without its padding."""

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
    """Of each network `file`, `sha256` of its weights, their name on the `hub` if they were downloaded, and the
    `precision` that it is kept in, where that is its own; older caches do not know these two."""
    settings: dict[str, Any]
    """Values of the settings that the features depend on."""
    dtype: str
    """The precision in which features are stored."""
    variants: int
    """Crops of each picture."""
    seed: int
    """The seed of the crops."""
    shapes: dict[str, dict[str, list[int]]]
    """Shapes of the features, by bucket."""
    variable_length: list[str] = field(default_factory=list)
    """Features that differ in length from sample to sample."""
    source: Any = None
    """The `webdataset_path` that the cache was made from; older caches do not know it."""
    version: int = CACHE_VERSION

    def write(self, folder: Path) -> None:
        """Write it into a folder of tars."""
        storage_for(str(folder)).write(f"{folder}/{CACHE_NAME}", f"{json.dumps(asdict(self), indent=1)}\n".encode())

    @classmethod
    def read(cls, folder: str, remedy: str = "remove the folder, or name another one") -> "Origin | None":
        """What the cache in a folder, a complete URL, was made with; None where it holds no cache.

        remedy: what to do where it is damaged, for the error message.

        Raises:
            UserError: it can't be read, or understood.
        """
        url = f"{folder}/{CACHE_NAME}"
        try:
            with storage_for(url).open(url) as file:
                content = file.read(MAX_JSON_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            values = parse_json(content)
        except ValueError as error:
            raise UserError(f"{url} is incomplete: {error}; {remedy}") from None
        if not isinstance(values, dict) or values.get("version") != CACHE_VERSION:
            raise UserError(f"{url} is not of version {CACHE_VERSION}; {remedy}")
        try:
            if unknown := sorted(values.keys() - {one.name for one in fields(cls)}):
                raise ValueError(f"it has a key {unknown[0]!r:.40}")
            found = TypeAdapter(cls).validate_json(content, strict=True)
            found._check()
        except ValueError as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
            raise UserError(f"{url} is damaged ({str(reason)[:200]}); {remedy}") from None
        return found

    def _check(self) -> None:
        """Raise ValueError where parts that belong together do not."""
        for name in self.features:
            if name not in self.makers:
                raise ValueError(f"it does not say which network made {name}")
            for bucket, shape in self.shapes.get(name, {}).items():
                parse_size(bucket)
                if any(size < 0 for size in shape):
                    raise ValueError(f"a shape of {name} is {shape}")
        if wrong := [name for name, one in self.networks.items() if not {"file", "sha256"} <= one.keys()]:
            raise ValueError(f"it does not say which weights the {wrong[0]} network had")
        if not 0 < self.variants <= MAX_VARIANTS or self.dtype not in get_args(Dtype):
            raise ValueError(f"variants is {self.variants}, dtype is {self.dtype!r:.40}")

    def fields(self, names: Collection[str]) -> dict[str, TensorField]:
        """How the loader reads these features of a sample, by their names in `Batch.extra`."""
        return {
            stored_name(name): TensorField(
                name,
                {parse_size(bucket): tuple(shape) for bucket, shape in self.shapes[name].items()},
                self.variants if "crop_mode" in self.features[name] else 1,
                self.dtype == "bfloat16",
                stored_name(lengths_name(name)) if name in self.variable_length else None,
            )
            for name in names
        }

    def differences(self, other: "Origin", names: Collection[str]) -> list[str]:
        """What that these features depend on differs from another cache or run, as a message."""
        found = [f"it has no {name}, but {', '.join(self.features)}" for name in names if name not in self.features]
        known = [name for name in names if name in self.features]
        for setting in dict.fromkeys(setting for name in known for setting in other.features[name]):
            here, there = self.settings.get(setting), other.settings[setting]
            name = DISPLAY_NAMES.get(setting, setting)
            if setting not in self.settings and there is not None:
                found.append(f"the cache does not say which {name} it was made with, here it is {there!r}")
            elif here != there:
                found.append(f"{name} is {here!r} in the cache, {there!r} here")
        for network in dict.fromkeys(other.makers[name] for name in known):
            here, there = self.networks.get(network), other.networks[network]
            if not there:
                continue
            if here is None:
                found.append(f"the cache does not say which weights the {network} network had")
            elif "sha256" in there and here["sha256"] != there["sha256"]:
                files = [f"{one['file']} (SHA-256 {one['sha256'][:12]}...)" for one in (here, there)]
                found.append(f"the weights of the {network} network are {files[0]} in the cache, {files[1]} here")
            elif "precision" in here and here["precision"] != there.get("precision"):
                found.append(
                    f"the {network} network is of {here['precision']} in the cache, {there['precision']} here"
                )
        return found


def stored(batch: Batch, name: str) -> Tensor | list[Tensor] | None:
    """A feature of every sample of a batch that was read from a cache, else None.

    (B, ...), or a list of B where the sizes differ; in the precision in which it is stored. A feature of variable
    length is padded with zeros, and its lengths are there as `stored(batch, lengths_name(name))`.
    """
    return batch.extra.get(stored_name(name))


def stored_name(name: str) -> str:
    """The name of a feature in `Batch.extra`."""
    return f"{name}.npy"


def members_of(origin: Origin, names: Collection[str]) -> frozenset[str]:
    """The members in which a cache holds these features, and how the pictures were cropped for them."""
    of_picture = [name for name in names if "crop_mode" in origin.features[name]]
    members = {variant_member(name, 0) for name in names}
    members |= {variant_member(name, variant) for name in of_picture for variant in range(origin.variants)}
    return frozenset(members | ({PICTURE_FACTS} if of_picture else set()))


def lengths_name(name: str) -> str:
    """The name of the lengths (B,) of a feature of variable length.

    A training gives such a feature as (B, L, ...), padded to the longest of the batch, and beside it the lengths by
    this name. So does `stored`.
    """
    return f"{name}_lengths"


def take_row(made: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """What belongs to one sample of features (B, ...), those of variable length without their padding."""
    row = {name: values[place] for name, values in made.items()}
    lengths = {name: row.get(lengths_name(name)) for name in row}
    return {name: value if lengths[name] is None else value[: lengths[name]] for name, value in row.items()}


def stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Features (B, ...) of samples, those of variable length padded with zeros to the longest."""
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True)
        if lengths_name(name) in rows[0]
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }
