"""The features that `tools/cache.py` makes: which ones, their sizes, and those of a batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from families.common.cache import Caches
from families.common.config import DiffusionConfig
from families.common.features import Origin, take_row
from families.common.training import DiffusionTraining
from warpcore.data.fields import Field, collate
from warpcore.data.lanes import bucket_name
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.keys import weights_keys
from warpcore.meta import META
from warpcore.random import SampleRandom
from warpcore.rehearsal import OnShapes, bucket_sizes, made_up_batch
from warpcore.use_case import UseCase

LONG_CAPTION = "picture " * 512
"""Shows the largest size of features of variable length."""
PIPELINE_PARTS = {"latents": ("vae",), "texts": ("text_encoder*", "tokenizer*", "t5_*")}
PIPELINE_PARTS["all"] = PIPELINE_PARTS["latents"] + PIPELINE_PARTS["texts"]
"""The folders of a pipeline of diffusers whose networks make the features of a kind."""
_OF_PICTURE = {"all": (True, False), "latents": (True,), "texts": (False,)}


def without_idle_weights(kind: type[DiffusionTraining], config: DiffusionConfig, features: str) -> DiffusionConfig:
    """The config without those weights, not on this machine, that make none of the features: no need to download them.

    features: one of `families.common.cache_commands.KINDS`.
    """
    named, text = weights_keys(type(config)), kind.keys_of_network(config, "text")
    beside_others = any(getattr(config, key, None) is None for key in text)
    others = [] if beside_others else [name for name in named if name not in text]
    idle = {"all": [], "latents": text, "texts": others}[features]
    absent = {name: getattr(config, name) for name in idle if name in named}
    return config.model_copy(update={name: None for name, path in absent.items() if path and not path.exists()})


class Maker:
    """Makes features of a kind, one of `families.common.cache_commands.KINDS`, with the networks of a training.

    Raises:
        UserError: the training has none of this kind.
    """

    def __init__(self, training: DiffusionTraining, kind: str):
        self.training, features = training, training.features
        self.names = [name for name, one in features.items() if one.of_picture in _OF_PICTURE[kind]]
        if not self.names:
            raise UserError(f"--features {kind}: this training has none, but {', '.join(features)}")
        self.of_pictures = [name for name in self.names if features[name].of_picture]
        self.of_texts = [name for name in self.names if not features[name].of_picture]

    def make(
        self, batch: Batch, random: SampleRandom, *, pictures: bool = True, texts: bool = True
    ) -> dict[str, list[Tensor]]:
        """The features of each sample of a batch, float32 on the CPU, by name.

        pictures, texts: whether those of its pictures, and of its captions, are wanted.
        """
        made = {}
        with torch.no_grad(), self.training.autocast():
            if pictures and self.of_pictures:
                made |= self.training.picture_features(batch, random)
            if texts and self.of_texts:
                made |= self.training.caption_features(batch)
        made = {
            name: values.cpu() if isinstance(values, Tensor) else [value.cpu() for value in values]
            for name, values in made.items()
        }
        rows = [take_row(made, place) for place in range(len(batch.seeds))]
        return {name: [row[name].float() for row in rows] for name in self.names if name in made}

    def shapes(
        self, sizes: Sequence[tuple[int, ...]], fields: Mapping[str, Field]
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of each feature by bucket, seen on black pictures.

        fields: what else of a sample the training reads.
        """
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        differ = any(self.training.features[name].variable_length for name in self.names)
        for size in dict.fromkeys(sizes):
            extra = collate(fields, [{name: one.blank(size) for name, one in fields.items()}])
            images = torch.zeros(1, *size[:-2], 3, *size[-2:], dtype=torch.uint8) if self.of_pictures else None
            batch = Batch(0, size, 0, 0, {}, images, [LONG_CAPTION if differ else ""], [""], [0], 1.0, extra=extra)
            random = SampleRandom(batch.seeds, self.training.device)
            for name, values in self.make(batch.to(self.training.device), random).items():
                shapes.setdefault(name, {})[bucket_name(size)] = tuple(values[0].shape)
        return shapes

    def bytes_per_sample(self, origin: Origin) -> int:
        """What a sample takes in a tar, at most."""
        item, parts = getattr(torch, origin.dtype).itemsize, 0
        for name in self.names:
            numbers = max(math.prod(shape) for shape in origin.shapes[name].values())
            parts += (numbers * item + 1024) * (origin.variants if name in self.of_pictures else 1)
        return parts + 3 * 1024  # headers and padding of what else a sample has


def as_if_cached(use_case: type[UseCase], config: DiffusionConfig, every_bucket: bool = True) -> type[UseCase]:
    """The use case as it is with caches that hold all its features, of which only the shapes are known; where it wants
    pictures in any case, those of texts.

    every_bucket: otherwise only of the largest bucket, which takes less time where there are many.

    Raises:
        UserError: it trains on pictures themselves, and has no texts.
    """
    if not issubclass(use_case, DiffusionTraining):
        raise UserError("--cached: this script trains on pictures themselves: there is nothing that could be cached")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with OnShapes(use_case, config, "cpu") as made:
        run, read = made.run, {}
        for size in bucket_sizes(run)[: None if every_bucket else 1]:
            batch = replace(made_up_batch(run, size, 1), captions=[LONG_CAPTION])
            batch = batch._map(lambda tensor: torch.empty_like(tensor, device=META))
            with torch.no_grad():
                read = read or (run.caption_features(batch) if run.needs_captions else {})  # alike in all buckets
                found = run.picture_features(batch, SampleRandom(batch.seeds, META)) | read
            for name in run.features:
                shapes.setdefault(name, {})[bucket_name(size)] = tuple(found[name][0].shape)
        features = run.features
        try:
            run.check_cacheable()
        except UserError as error:
            features = {name: one for name, one in features.items() if not one.of_picture}
            if not features:
                raise UserError(f"--cached: {error}") from None
    origin = Origin(
        features={name: list(one.settings) for name, one in features.items()}, settings={},
        makers={name: one.network for name, one in features.items()},
        networks={one.network: {"file": "", "sha256": ""} for one in features.values()},
        dtype="float16", variants=1, seed=config.seed, shapes=shapes,
        variable_length=[name for name, one in features.items() if one.variable_length],
    )  # fmt: skip
    texts = {name: next(iter(shapes[name].values())) for name, one in features.items() if not one.of_picture}

    class Cached(use_case):
        caches = Caches(dict.fromkeys(features, origin), dict.fromkeys(features, ""))

        def prompt_features(self, texts_to_draw: Sequence[str]) -> dict[str, torch.Tensor]:
            return {name: torch.zeros(len(texts_to_draw), *shape) for name, shape in texts.items()}

    return Cached
