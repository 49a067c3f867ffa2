"""What trains NOVA: networks, what it is told, the loss, drawing."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.beginning import check_family
from families.common.cache import Shape
from families.common.captions import captions_kept
from families.common.class_training import ClassSamples
from families.common.classes import label_tensors
from families.common.clip_training import CLIP_SETTINGS, ClipTraining
from families.common.family import TEXT_TO_IMAGE, TEXT_TO_VIDEO
from families.common.features import Feature, lengths_name, stored
from families.common.library_files import CONFIG_KEY
from families.common.pictures import to_pictures, to_uint8
from families.common.prompt_samples import PromptSamples
from families.common.sampling import sample_seeds
from families.common.weight_files import GENERATOR, TARGET_KEY
from families.nova import build
from families.nova.autoencoder import autoencoder, autoencoder_files, latents_of
from families.nova.config import NovaConfig
from families.nova.files import config_said
from families.nova.generation import Drawing
from families.nova.guidance import TokenGuidance
from families.nova.loss import TokenDraws, token_losses
from families.nova.sampling import draw_clips
from families.nova.schedulers import scheduler_said
from warpcore.config import ConfigError
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

MOMENTS, TEXT = "moments", "text"
LENGTHS = lengths_name(TEXT)
Told = dict[str, Tensor]
"""Arguments of `NOVATransformer.condition`."""


class NovaTraining(ClipTraining, ClassSamples, PromptSamples):
    """Trains NOVA's transformer on pictures, which are clips of one frame, or on clips."""

    config: NovaConfig
    family = "nova"
    drawn_with = frozenset({"autoencoder"})
    start_keys = ()  # `build.check_network` compares all numbers of the network, and lets clips begin with pictures

    def check_start(self) -> None:
        check_family(self.config, self.family)
        self._check_frames()
        path = self.config.generator_checkpoint_path
        if path is not None and path.exists():
            build.check_network(config_said(path, GENERATOR), self.config, from_pictures=True)
            shift = scheduler_said(path).get("shift", self.config.shift)
            if shift != self.config.shift and "shift" not in self.config.model_fields_set:
                raise ConfigError(f"shift: the scheduler beside {path} says {shift:g}: write that, or another number")

    def said_target(self) -> str | None:
        path = self.config.generator_checkpoint_path
        return super().said_target() or (scheduler_said(path).get(TARGET_KEY) if path is not None else None)

    def _check_frames(self) -> None:
        version, frames = self.config.model_version, self.config.buckets(self.bucket_factor).largest[0]
        if frames > 1 and not self.config.version.draws_clips:
            raise ConfigError(
                f"model_version: {version} draws pictures, and this run has clips of {frames} frames: write "
                "num_frames: 1, or a model_version of clips"
            )

    @property
    def default_target(self) -> str:
        return self.config.version.target

    @property
    def drawing_task(self) -> str:
        return TEXT_TO_VIDEO if self.config.version.draws_clips else TEXT_TO_IMAGE

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return build.process(self.config, loss_weight)

    # ---------------------------------------------------------------- features

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        texts = {} if self.learns_classes else {"text": partial(build.text_encoder, self.config, self.device)}
        return {"autoencoder": partial(autoencoder, self.config)} | texts

    def network_files(self, network: str) -> list[Path]:
        return build.text_files(self.config) if network == "text" else autoencoder_files(self.config)

    @property
    def features(self) -> dict[str, Feature]:
        texts = {} if self.learns_classes else self.caption_features_to_cache(TEXT)
        texts = {name: Feature(one.network, one.settings, variable_length=True) for name, one in texts.items()}
        return {MOMENTS: Feature("autoencoder", CLIP_SETTINGS)} | texts

    def read_shape(self, name: str) -> Shape | None:
        version = self.config.version
        known = {MOMENTS: (2 * version.network["image_dim"], None, None, None), TEXT: (None, version.text_width)}
        return known.get(name)

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return {MOMENTS: self.networks["autoencoder"].clip_moments(batch.images)}

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        said = to_device(torch.tensor([bool(caption.strip()) for caption in captions]), made.lengths.device)
        return {TEXT: made.hidden.float(), LENGTHS: made.lengths * said}  # the network has an empty text of its own

    def feature_decoder(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        autoencoder = self.make_encoder("autoencoder").eval().to(self.device)
        return lambda features: autoencoder.decoded_clips(autoencoder.scale.latents(features[MOMENTS], None))

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return latents_of(self.config)

    @property
    def bucket_factor(self) -> int:
        return 2 * build.token_px(self.config)  # the tokens of the video encoder cover four

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures for which the network has places.

        Raises:
            ConfigError: there are several sizes, for which it would have to be a network with rotary positions.
        """
        buckets = self.config.buckets(self.bucket_factor)
        sizes = sorted({size[1:] for size in buckets.sizes})
        if len(sizes) > 1 and not self.config.rotary_pos_embed:
            told = ", ".join(f"{width} x {height}" for height, width in sizes)
            raise ConfigError(
                f"multi_aspect_ratio or bucket_config: buckets of {told} px, but this network has places for one "
                "size: write one size, or rotary_pos_embed: true"
            )
        return buckets.largest[1:]

    def index_columns(self) -> list[str]:
        column = self.config.motion_column
        return [*super().index_columns(), *([column] if column else [])]

    # ---------------------------------------------------------------- an update

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Told]:
        config, moments = self.config, stored(batch, MOMENTS)
        moments = self.picture_features(batch, random)[MOMENTS] if moments is None else moments
        latents = self.latents[0].latents(moments, random if config.latent == "sample" else None)
        return latents, {"labels": self.labels(batch, random)} if self.learns_classes else self.told(batch)

    def told(self, batch: Batch) -> Told:
        """What the network is told of the samples of a batch, in texts."""
        texts = {name: stored(batch, name) for name in (TEXT, LENGTHS)}
        texts = self.text_conditions(batch.captions) if texts[TEXT] is None else texts
        return self.of_texts(texts) | self.motion_of(batch)

    def of_texts(self, texts: Mapping[str, Tensor]) -> Told:
        return {"text": texts[TEXT].float(), "lengths": texts[LENGTHS]}

    def motion_of(self, batch: Batch) -> Told:
        column = self.config.motion_column
        return {"flow": to_device(batch.columns[column].float(), self.device)} if column else {}

    def loss(self, inputs: tuple[Tensor, Told], random: SampleRandom) -> Losses:
        (latents, told), config, network = inputs, self.config, self.networks["generator"]
        channels, frames, height, width = latents.shape[1:]
        patch = network.patch
        draws = TokenDraws.of(
            random, self.diffusion, frames, height * width // patch**2, channels * patch**2, config.loss_repeat
        )
        if not self.learns_classes:
            told = told | {"lengths": told["lengths"] * captions_kept(random, config.caption_dropout)}
        found = token_losses(network, self.diffusion, latents, draws, told)
        loss, raw = (found.of_samples(one, config.learn_first_frame) for one in (found.loss, found.raw))
        return Losses(loss if self.sample_weight is None else loss * self.sample_weight, raw)

    # ---------------------------------------------------------------- drawing

    @property
    def drawing(self) -> Drawing:
        config = self.config
        return Drawing(config.sample_groups, config.sample_steps, TokenGuidance(config.sample_guidance))

    def draw(self, prompts: list[str], size: Sequence[int], motion: Told | None = None) -> dict[str, np.ndarray]:
        """Clips of prompts, uint8 (B, T, H, W, 3), of `size` (T, H, W) in px; pictures (B, H, W, 3) where T is 1."""
        told = self.of_texts(self.text_conditions(prompts))
        told |= self.motion_told(len(prompts)) if motion is None else motion
        return self._drawn(told, told | {"lengths": torch.zeros_like(told["lengths"])}, size)

    def draw_classes(self, labels: list[int], size: Sequence[int]) -> dict[str, np.ndarray]:
        """The same of classes."""
        told = label_tensors(labels, self.config.num_classes, self.device)
        return self._drawn(*({"labels": one} for one in told), size)

    def _drawn(self, told: Told, empty: Told, size: Sequence[int]) -> dict[str, np.ndarray]:
        network, autoencoder = self.networks["generator"], self.networks["autoencoder"]
        condition = network.condition(**told)
        latents = draw_clips(
            network, self.diffusion, self.drawing, sample_seeds(self.config.seed, len(condition)),
            autoencoder.latent_frames(size[0]), condition, network.condition(**empty),
        )  # fmt: skip
        drawn = to_pictures(autoencoder.decoded_clips(latents))
        return {"sample": drawn if size[0] > 1 else drawn[:, 0]}

    def motion_told(self, count: int) -> Told:
        config = self.config
        return {"flow": torch.full((count,), config.sample_flow, device=self.device)} if config.motion_column else {}

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config, shown = self.config, {}
        fps = {"fps": config.frame_rate} if config.frame_rate else {}
        size = config.buckets(self.bucket_factor).largest if held_out is None else held_out.size
        if self.learns_classes:
            labels = self.labels_to_draw(held_out)
            titles, drawn = self.titles(labels), self.draw_classes(labels, size)
        elif held_out is None:
            titles = config.sample_prompts[: config.sample_count]
            drawn = self.draw(titles, size)
        else:
            titles = held_out.captions[: config.sample_count]
            motion = {name: values[: len(titles)] for name, values in self.motion_of(held_out).items()}
            drawn = self.draw(titles, size, motion)
        if held_out is not None and held_out.images is not None:
            clips = to_uint8(held_out.images[: len(titles)])
            shown = {"clip": clips} if size[0] > 1 else {"picture": clips[:, 0]}
        return Sampled.rows(titles, shown | drawn, **fps)

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | {CONFIG_KEY: json.dumps(build.network_numbers(self.config, self.size_px))}
