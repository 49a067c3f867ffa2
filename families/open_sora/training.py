"""What the training scripts of Open-Sora share: networks, conditions, given frames, the loss, drawing."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.cache import Shape
from families.common.captions import captions_kept
from families.common.clip_training import CLIP_SETTINGS, ClipTraining
from families.common.family import TEXT_TO_VIDEO
from families.common.features import CAPTION_SETTINGS, Feature, lengths_name, stored
from families.common.pictures import to_pictures, to_uint8
from families.common.prompt_samples import PromptSamples
from families.common.sampling import sample_seeds
from families.common.weight_files import GENERATOR
from families.common.weights import check_names
from families.open_sora import build
from families.open_sora.autoencoder import autoencoder, autoencoder_files, latents_of
from families.open_sora.conditions import FEATURE, Conditions, Denoiser, asked_of, of_clips, told
from families.open_sora.config import OpenSoraConfig
from families.open_sora.files import MODEL, published_run, read_average
from families.open_sora.sampling import draw_clips
from families.open_sora.versions import FLOW
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.frame_masks import frame_masks
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

MOMENTS = "moments"
Inputs = tuple[Tensor, Conditions]


class OpenSoraTraining(ClipTraining, PromptSamples):
    """Trains the denoiser of Open-Sora, or what steers it."""

    config: OpenSoraConfig
    family = "open_sora"
    drawn_with = frozenset({"autoencoder"})
    taken_over: str | None = None
    """What was taken over of a checkpoint of the published program, as a line."""

    drawing_task = TEXT_TO_VIDEO

    def said_target(self) -> str | None:
        return self.config.version.target

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return build.process(self.config, loss_weight, self.config.offset_noise)

    def take_over(self) -> None:
        """Of a checkpoint of the published program: its average, and the number of its updates."""
        config = self.config
        if self.frozen_base or are_only_shapes():
            return
        if (run := published_run(config.generator_checkpoint_path, GENERATOR)) is None:
            return
        self._check_what_is_left(run.folder, run.updates)
        self.update, taken, left_out = run.updates, "weights", run.left_out
        average = self.averages.get("generator")
        if run.average is not None and average is not None and average.start <= run.updates:
            tensors = read_average(run, GENERATOR, config.model_version)
            check_names(self.networks["generator"].state_dict(), tensors, run.average, GENERATOR)
            average.begin_with(tensors, run.updates)
            taken = "weights, average"
        elif run.average is not None:
            why = "no ema_start_iters" if average is None else f"ema_start_iters: {average.start}"
            left_out = [*left_out, f"{run.average.name} ({why})"]
        self.taken_over = (
            f"{run.folder}: {taken} and {run.updates} updates are taken over; not taken: "
            f"{', '.join(left_out) or 'nothing'}, so the optimizer and the data begin from scratch"
        )

    def _check_what_is_left(self, folder: Path, update: int) -> None:
        """Raise UserError where no update is left after a checkpoint; of epochs, data tell the number of updates."""
        if isinstance(updates := self.config.updates, int) and update >= updates:
            raise UserError(
                f"{GENERATOR}: {folder} is at update {update}, from which this run goes on, and updates is {updates}; "
                f"write a larger number, or name {folder / MODEL}, whose weights count from 0"
            )

    def setup(self) -> None:
        super().setup()
        if self.taken_over:
            self._check_what_is_left(self.config.generator_checkpoint_path, self.update)
            self.progress.say(self.taken_over)

    # ---------------------------------------------------------------- features

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "autoencoder": partial(autoencoder, self.config),
            "text": partial(build.text_encoder, self.config, self.device, self.config.version.cleans_captions),
        }

    def network_files(self, network: str) -> list[Path]:
        return build.text_files(self.config) if network == "text" else autoencoder_files(self.config)

    caption_settings = (*CAPTION_SETTINGS, "cleans_captions", "text_length")

    def feature_setting(self, name: str) -> Any:
        """Caches of 1.2 do not say how their captions were read."""
        version = self.config.version
        if name == "text_length":
            return None if version.target == FLOW else version.text_length
        return version.cleans_captions or None if name == "cleans_captions" else super().feature_setting(name)

    @property
    def features(self) -> dict[str, Feature]:
        texts = self.caption_features_to_cache(FEATURE)
        texts = {name: Feature(one.network, one.settings, variable_length=True) for name, one in texts.items()}
        return {MOMENTS: Feature("autoencoder", CLIP_SETTINGS)} | texts

    def read_shape(self, name: str) -> Shape | None:
        numbers = self.config.version.network
        known = {MOMENTS: (2 * numbers["in_channels"], None, None, None), FEATURE: (None, numbers["caption_channels"])}
        return known.get(name)

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return {MOMENTS: self.networks["autoencoder"].clip_moments(batch.images, random)}

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        return {FEATURE: made.hidden.float(), lengths_name(FEATURE): made.lengths}

    def feature_decoder(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        autoencoder = self.make_encoder("autoencoder").eval().to(self.device)

        def decode(features: Mapping[str, Tensor]) -> Tensor:
            latents = autoencoder.scale.latents(features[MOMENTS], None)
            return autoencoder.decoded_clips(latents, autoencoder.frames_of(latents.shape[2]))

        return decode

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return latents_of(self.config)

    @property
    def bucket_factor(self) -> int:
        return self.latents[1]  # not of patches: the network fills these up

    # ---------------------------------------------------------------- an update

    def encode(self, batch: Batch, random: SampleRandom) -> Inputs:
        config, moments = self.config, stored(batch, MOMENTS)
        moments = self.picture_features(batch, random)[MOMENTS] if moments is None else moments
        latents = self.latents[0].latents(moments, random if config.latent == "sample" else None)
        conditions = self.text_told(batch) | of_clips(batch.size, batch.columns["fps"])
        if config.mask_ratios and latents.shape[2] > 1:
            masks = frame_masks(config.mask_ratios, latents.shape[2], batch.seeds)
            conditions["x_mask"] = to_device(masks, self.device)
        return latents, conditions

    def text_told(self, batch: Batch) -> Conditions:
        texts = {name: stored(batch, name) for name in (FEATURE, lengths_name(FEATURE))}
        texts = self.text_conditions(batch.captions) if texts[FEATURE] is None else texts
        return told(texts, self.config.version.text_length)

    def loss(self, inputs: Inputs, random: SampleRandom) -> Losses:
        latents, conditions = inputs
        noised = conditions.get("x_mask")
        dropped = ~captions_kept(random, self.config.caption_dropout)
        return self.denoising_loss(
            latents, random,
            partial(
                self.networks["generator"], **asked_of(self.config.version, conditions | {"dropped": dropped})
            ),
            shift=build.time_shift(self.config, conditions["height"], conditions["width"], latents.shape[2]),
            noised=None if noised is None else noised[:, None, :, None, None],
        )  # fmt: skip

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.networks["generator"], self.config.version)

    # ---------------------------------------------------------------- drawing

    def draw(self, prompts: list[str], size: Sequence[int], fps: Tensor | None = None) -> dict[str, np.ndarray]:
        """Clips of prompts, uint8 (B, T, H, W, 3) each, of `size` (T, H, W) in px; fps: (B,), 0 of pictures."""
        config, autoencoder = self.config, self.networks["autoencoder"]
        fps = torch.full((len(prompts),), config.frame_rate or config.version.fps) if fps is None else fps
        conditions = told(self.text_conditions(prompts), config.version.text_length)
        frames = autoencoder.latent_frames(size[0])
        latents = draw_clips(
            self.diffusion, self.denoiser, conditions | of_clips(size, to_device(fps, self.device)),
            (autoencoder.latent_channels, frames, *(side // autoencoder.compression for side in size[1:])),
            sample_seeds(config.seed, len(prompts)),
            shift=build.drawing_shift(config, size, frames), steps=config.sample_steps,
            sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_channels=config.guided_channels(config.sample_sampler),
        )  # fmt: skip
        return {"sample": to_pictures(autoencoder.decoded_clips(latents, size[0]))}

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        if config.sample_prompts:
            prompts, size = config.sample_prompts[: config.sample_count], self.largest_bucket
            return Sampled.rows(prompts, self.draw(prompts, size), fps=config.frame_rate or config.version.fps)
        prompts, fps = held_out.captions[: config.sample_count], held_out.columns["fps"][: config.sample_count]
        shown = {} if held_out.images is None else {"clip": to_uint8(held_out.images[: len(prompts)])}
        rate = float(fps.cpu().max()) or Sampled.fps  # they move together in one sheet
        return Sampled.rows(prompts, shown | self.draw(prompts, held_out.size, fps), fps=rate)

    @property
    def largest_bucket(self) -> tuple[int, ...]:
        """(T, H, W) in px."""
        return self.config.buckets(self.bucket_factor).largest
