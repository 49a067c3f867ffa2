"""The training that a page of data is of: that of a script and its config, or a plain one of pictures or clips."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from families.common.features import Origin
from families.common.members import MASK
from families.common.sample_fields import SampleFields, SampleSettings
from families.common.t5 import StandInTokenizer
from warpcore.arguments import read_arguments
from warpcore.clip_keys import ClipKeys
from warpcore.config import Config, load_config, make_config
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog, open_catalog, read_summaries
from warpcore.data.needs import DataNeeds
from warpcore.data.samples import VIDEO_EXTENSIONS, visual_member
from warpcore.data.shards import Shard, Source, named_folders, resolve_sources
from warpcore.data.storage import is_remote
from warpcore.errors import UserError
from warpcore.meta import only_shapes
from warpcore.rehearsal import OnShapes, load_use_case
from warpcore.use_case import UseCase

REMOTE_SHARDS = 32
"""Tars of a data set on another machine that are looked at by default."""
UNINDEXED_SHARDS = 4
"""Of those among them that have no index, and would be read to make one."""
PLAIN = {
    "experiment_id": "inspected", "checkpoint_path": "runs", "updates": 1, "batch_size": 1, "image_size": 512,
    "multi_aspect_ratio": [1.0, 3 / 4, 2 / 3, 9 / 16],
}  # fmt: skip
"""Keys of a training that nobody named."""
PLAIN_FRAMES = 16


@dataclass(frozen=True)
class Bounds:
    """How much of a data set is looked at."""

    shards: int | None = None
    """Tars; None: all on this machine, REMOTE_SHARDS elsewhere."""
    rows: int = 100_000
    """Rows of their indexes that are listed."""
    read: int | None = None
    """Of these, samples whose caption and picture are read; None: a number on this machine, `pictures` elsewhere."""
    pictures: int = 240
    """Of these, samples that are shown as training would see them."""


@dataclass(frozen=True)
class Sampling:
    """What of a data set is looked at."""

    shards: int
    """How many there are."""
    chosen: list[Shard]
    remote: bool
    unindexed: int = 0
    """Tars that were left out as they have no index."""

    @property
    def whole(self) -> bool:
        return len(self.chosen) == self.shards


@dataclass(frozen=True)
class Training:
    """What a page of data has to know of a training; no network of it has weights."""

    run: UseCase
    config: Config
    needs: DataNeeds
    sampling: Sampling
    told: list[str]
    """What to say about it."""
    text: nn.Module | None = None
    """Its text encoder, of which only the tokenizer is used; None where that is not here."""


def of_script(script: Path, arguments: Sequence[str], bounds: Bounds) -> Training:
    """The training of a script and its config, `[CONFIG, key=value, ...]`.

    Raises:
        UserError: it can't be built, or its data are caches, which hold no pictures.
    """
    use_case = load_use_case(script)
    config = load_config(use_case.Config, list(arguments))
    for folder in named_folders(config.webdataset_path):
        if (origin := Origin.read(folder)) is not None:
            raise UserError(
                f"{folder} is a cache, which holds what was made of pictures: name these themselves, as with "
                f"webdataset_path={origin.source or 'THE_PICTURES'}"
            )
    cached = {key: [] for key in ("caches", "validation_caches") if key in type(config).model_fields}
    sampling, config, told = _sampled(config.model_copy(update=cached), bounds)
    with ExitStack() as built:
        built.enter_context(only_shapes())
        run = built.enter_context(OnShapes(use_case, config, "cpu")).run
        needs, text = run.data_needs(), run.networks.get("text")
    if text is None:
        told.append("This training has no text encoder: no caption is cut." if needs.captions else "")
    elif any(isinstance(getattr(one, "tokenizer", None), StandInTokenizer) for one in text.modules()):
        text = None
        told.append(
            "Captions that are too long were not looked for: the text encoder's tokenizer is not on this machine. "
            "Start the training, or models/download.py, to fetch it."
        )
    return Training(run, config, needs, sampling, [*filter(None, told)], text)


def of_paths(paths: Sequence[str], arguments: Sequence[str], bounds: Bounds) -> Training:
    """A plain training on paths as in `webdataset_path`, with further keys `key=value`: of clips, where these hold
    videos and no pictures, and without captions, where no sample has the members of `captions_getter`.

    Raises:
        UserError: there are no such tars.
    """
    sampling, catalog = _choose(list(paths), bounds)
    of_clips = visual_member(catalog.members) in VIDEO_EXTENSIONS
    kind = PlainClips if of_clips else PlainPictures
    masks = {"masked_loss": True} if MASK in catalog.members and not of_clips else {}
    values = PLAIN | ({"num_frames": PLAIN_FRAMES} if of_clips else masks) | {"webdataset_path": list(paths)}
    read_arguments(kind.Config, list(arguments), values)
    config = make_config(kind.Config, values)
    sampling, config, told = _sampled(config, bounds, sampling)
    run = kind(config.model_copy(update={"device": "cpu"}))
    run.close()
    captions = CaptionGetter.parse(config.captions_getter)
    run.has_captions = catalog.members >= {*captions.members}
    sizes = " x ".join(map(str, config.image_size)) if isinstance(config.image_size, tuple) else config.image_size
    told.append(
        f"No training was named: buckets are those of image_size {sizes}, multi_aspect_ratio "
        f"{[round(ratio, 3) for ratio in config.multi_aspect_ratio or [1]]} and sides that are multiples of "
        f"{kind.bucket_factor}" + (f", clips have {config.num_frames} frames" if of_clips else "") + ". Keys such as "
        "image_size=256 change them. Captions that a text encoder would cut off were not looked for. A training "
        "script and its config say all of it: python3 tools/inspect_dataset.py train/SCRIPT.py CONFIG.yaml PAGE.html "
        "webdataset_path=PATH"
    )
    if not run.has_captions:
        told.append(f"No sample has a .{' and a .'.join(captions.members)}: no captions are read (captions_getter).")
    return Training(run, config, run.data_needs(), sampling, told)


class _PlainConfig(SampleSettings, Config):
    pass


class _ClipsConfig(ClipKeys, SampleSettings, Config):
    pass


class PlainPictures(SampleFields):
    """A training on pictures that is none."""

    Config = _PlainConfig
    bucket_factor = 32
    has_captions = True

    @property
    def needs_captions(self) -> bool:
        return self.has_captions and super().needs_captions

    def extra_fields(self) -> dict:
        return self.sample_fields(from_cache=False)


class PlainClips(PlainPictures):
    """A training on clips that is none."""

    Config = _ClipsConfig
    takes_videos = True


# ------------------------------------------------------------------ sampling


def _sampled(config: Config, bounds: Bounds, known: Sampling | None = None) -> tuple[Sampling, Config, list[str]]:
    """What is looked at, the config for that, and what to tell of it."""
    sampling = known or _choose(config.webdataset_path, bounds)[0]
    if sampling.whole:
        return sampling, config, []
    weights = {
        shard.url: source.weight for source in resolve_sources(config.webdataset_path) for shard in source.shards
    }
    entries = [{"path": shard.url, "weight": max(1.0, weights[shard.url])} for shard in sampling.chosen]
    changes = {"webdataset_path": entries, "validation_path": None, "validation_samples": 0, "lanes": None}
    told = [
        f"Sampled: {len(sampling.chosen)} of {sampling.shards} tars, spread evenly over their names. Counts are those "
        "of these tars; crops and other draws are those that a training on them alone would have."
    ]
    if sampling.unindexed:
        told.append(
            f"{sampling.unindexed} of the tars that would have been looked at have no index: python3 "
            "tools/index_dataset.py makes them."
        )
    if config.validation_path is not None or config.validation_samples:
        told.append("What is held out for validation is not left out of a sampled data set.")
    return sampling, config.model_copy(update=changes), told


def _choose(path: Any, bounds: Bounds) -> tuple[Sampling, Catalog]:
    """The tars that are looked at, and their catalog."""
    sources = resolve_sources(path)
    shards = sorted((shard for source in sources for shard in source.shards), key=lambda shard: shard.url)
    remote = any(is_remote(shard.url) for shard in shards)
    chosen, unindexed = _spread(shards, bounds.shards or (REMOTE_SHARDS if remote else len(shards))), 0
    if remote:
        unknown = [shard for shard, summary in read_summaries(chosen).items() if summary is None]
        left_out = {shard.url for shard in unknown[UNINDEXED_SHARDS if len(unknown) == len(chosen) else 0 :]}
        left_out = left_out if len(chosen) > UNINDEXED_SHARDS else set()
        chosen, unindexed = [shard for shard in chosen if shard.url not in left_out], len(left_out)
    catalog = open_catalog([Source(1.0, chosen)])
    if catalog.num_rows > bounds.rows and len(chosen) > 1:
        rows = dict(zip(catalog.urls, catalog.rows.tolist(), strict=True))
        per_shard = catalog.num_rows / len(rows)
        chosen = _spread([shard for shard in chosen if shard.url in rows], max(1, int(bounds.rows / per_shard)))
    return Sampling(len(shards), chosen, remote, unindexed), catalog


def _spread(shards: list[Shard], count: int) -> list[Shard]:
    return [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int))]
