"""What training scripts of networks that draw classes share: classes of samples, their dropout, the loss."""

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.beginning import check_family
from families.common.library_files import CONFIG_KEY
from families.common.sampling import draw_latents, sample_seeds
from families.common.weight_files import GENERATOR, metadata_of
from families.dit import build
from families.dit.classes import ClassField, class_conditions, title_of
from families.dit.config import ClassConfig
from families.dit.files import NAMES_KEY, dit_numbers, names_said
from families.dit.training import LatentTraining, latent_shape
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.random import SampleRandom

logger = logging.getLogger(__name__)

CLASS = "class"
"""What a batch calls the classes of its samples."""


class ClassTraining(LatentTraining):
    """Trains a DiT or a Latte; a script builds it, and draws samples with it."""

    config: ClassConfig
    needs_captions = False

    def __init__(self, config: ClassConfig):
        super().__init__(config)
        self.class_field = ClassField.parse(config.class_getter, config.num_classes, config.class_names)

    def check_start(self) -> None:
        check_family(self.config, self.family)
        path = self.config.generator_checkpoint_path
        if path is not None and path.exists():
            build.check_network(dit_numbers(path, GENERATOR), self.config)

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        super().begin(saved)
        own, file = self.config.class_names, self.config.generator_checkpoint_path
        if saved is not None:
            before = names_said(saved.get("about", {}), "class_names of the checkpoint")
            if own and before and own != before:
                raise UserError(
                    f"class_names: this run has learned {_changed(before, own)}. Restore the names, or begin another "
                    "run (experiment_id)"
                )
            return
        numbers = {name: i for i, name in enumerate(names_said(metadata_of(Path(file or "")), f"names of {file}"))}
        if moved := [(name, i, numbers[name]) for i, name in enumerate(own) if numbers.get(name, i) != i]:
            logger.warning(
                "class_names: %r is class %d here and class %d in %s: the network has to learn it again, unless the "
                "names are written in the order of that file", *moved[0], file,
            )  # fmt: skip

    def sample_fields(self, from_cache: bool) -> dict[str, Any]:
        return super().sample_fields(from_cache) | {CLASS: self.class_field}

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor]:
        labels, dropped = batch.extra[CLASS], random.uniform("class dropout") < self.config.class_dropout
        empty = labels.new_full((), self.config.num_classes)  # the last row of the network's table
        return self.latents_of(batch, random), torch.where(dropped, empty, labels)

    def loss(self, inputs: tuple[Tensor, Tensor], random: SampleRandom) -> Losses:
        latents, labels = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], y=labels))

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_classes

    def labels_to_draw(self, held_out: Batch | None) -> list[int]:
        """The classes of samples: those of the config, or else of held-out samples."""
        count = self.config.sample_count
        return self.config.sample_numbers[:count] if held_out is None else held_out.extra[CLASS][:count].cpu().tolist()

    def titles(self, labels: list[int]) -> list[str]:
        """What drawings of classes are called."""
        return [title_of(label, self.config.class_names) for label in labels]

    def draw_latents(self, labels: list[int], size: tuple[int, ...]) -> Tensor:
        """Scaled latents (B, C, h, w) of classes for pictures of (H, W) px, or (B, C, T, h, w) for clips (T, H, W)."""
        config, autoencoder = self.config, self.networks["autoencoder"]
        return draw_latents(
            self.diffusion, self.networks["generator"],
            *class_conditions(labels, config.num_classes, self.device),
            latent_shape(size, autoencoder.latent_channels, autoencoder.compression),
            sample_seeds(config.seed, len(labels)),
            steps=config.sample_steps, sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_rescale=0.0, guidance_channels=config.guided_channels(config.sample_sampler),
        )  # fmt: skip

    def file_metadata(self) -> dict[str, str]:
        numbers = build.network_numbers(self.config, self.size_px)
        names = self.config.class_names
        said = {NAMES_KEY: json.dumps({"names": names}, ensure_ascii=False)} if names else {}
        return super().file_metadata() | {CONFIG_KEY: json.dumps(numbers)} | said


def _changed(before: list[str], own: list[str]) -> str:
    """Which class is called otherwise, in a sentence."""
    if len(before) != len(own):
        return f"{len(before)} classes, and here are {len(own)} names"
    number = next(i for i, pair in enumerate(zip(before, own, strict=True)) if pair[0] != pair[1])
    return f"class {number} as {before[number]!r}, which is {own[number]!r} here"
