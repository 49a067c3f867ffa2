"""Features: what frozen networks make of a sample, and what a cache of them was made with.

`NAME.npy` members of a cache's tars hold them; `cache.json` in every folder of tars says what they were made with.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from warpcore.data.lanes import parse_size
from warpcore.data.reader import Batch, TensorField
from warpcore.data.storage import storage_for
from warpcore.errors import UserError

CACHE_NAME = "cache.json"
CACHE_VERSION = 1
Dtype = Literal["float32", "bfloat16", "float16"]
CAPTION_SETTINGS = ("captions_getter", "token_ids")
PICTURE_SETTINGS = ("bucket_sizes", "crop_mode", "background")
DISPLAY_NAMES = {"bucket_sizes": "bucket_sizes (image_size, multi_aspect_ratio)"}


REMAKE = "recreate the cache with tools/cache.py"


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
            raise UserError(f"{url} is incomplete: {error}; {REMAKE}") from None
        if not isinstance(values, dict) or values.get("version") != CACHE_VERSION:
            raise UserError(f"{url} is not of version {CACHE_VERSION}; {REMAKE}")
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
                found.append(f"{DISPLAY_NAMES.get(setting, setting)} is {here!r} in the cache, {there!r} here")
        for network in dict.fromkeys(other.makers[name] for name in known):
            here, there = self.networks.get(network), other.networks[network]
            if here is None:
                found.append(f"the cache does not say which weights the {network} network had")
            elif here["sha256"] != there["sha256"]:
                files = [f"{one['file']} (SHA-256 {one['sha256'][:12]}...)" for one in (here, there)]
                found.append(f"the weights of the {network} network are {files[0]} in the cache, {files[1]} here")
        return found


def stored(batch: Batch, name: str) -> Tensor | list[Tensor] | None:
    """A feature of every sample of a batch that was read from a cache, else None.

    (B, ...), or a list of B where the sizes differ; in the precision in which it is stored.
    """
    return batch.extra.get(stored_name(name))


def stored_name(name: str) -> str:
    """The name of a feature in `Batch.extra`."""
    return f"{name}.npy"


def bucket_name(size: tuple[int, int]) -> str:
    """A bucket (H, W) as text, as `parse_size` reads it."""
    return f"{size[0]}x{size[1]}"
