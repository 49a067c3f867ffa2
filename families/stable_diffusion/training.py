"""What the training scripts of Stable Diffusion share: networks, the diffusion process, drawing."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.cache import Shape
from families.common.features import CAPTION_SETTINGS, Origin
from families.common.pictures import to_pictures
from families.common.prompt_samples import PromptSamples
from families.common.sampling import draw_latents, sample_seeds
from families.stable_diffusion import build
from families.stable_diffusion.components import SKIP_KEY, TEXT_MODEL_KEY, TOKENS_KEY
from families.stable_diffusion.conditions import SIZES, told, whole_pictures
from families.stable_diffusion.config import SdConfig, SdFinetuneConfig
from families.stable_diffusion.t5_texts import PROJECTION, PROJECTION_KEY, TEXT_PROJECTION, projection_folder
from warpcore.diffusion.diffusion import GDF
from warpcore.parameter_groups import ParameterGroup


class SdTraining(PromptSamples):
    """Trains the U-Net of Stable Diffusion, or what steers it."""

    config: SdConfig
    family = "stable_diffusion"
    drawn_with = frozenset({"autoencoder"})
    conventions = PromptSamples.conventions | {"last_flow_time": "999"}
    first_conventions = PromptSamples.first_conventions | {"last_flow_time": "1000"}

    @property
    def first_defaults(self) -> Mapping[str, Any]:
        return {"min_sigma": 0.0} if self.config.diffusion_target == "rectified_flows" else {}

    @property
    def caption_settings(self) -> tuple[str, ...]:
        return (*CAPTION_SETTINGS, self.text_length, SKIP_KEY)

    @property
    def text_length(self) -> str:
        """The key that says how much of a text is read."""
        return "text_tokens" if self.config.text_model == "t5" else "text_chunks"

    def settle_features(self, about: Mapping[str, Any] | None) -> None:
        self.config = build.with_clip_skip(self.config, about)

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        about = None if saved is None else saved.get("about", {})
        self.config = build.with_zero_terminal_snr(self.config, about)
        super().begin(saved)

    def setup(self) -> None:
        super().setup()
        if self.dtype == torch.float16 and "autoencoder" in self.networks:
            self.progress.say(
                f"dtype: float16 is not for the autoencoder, which computes in {self.config.autoencoder_precision} "
                "(autoencoder_precision): SDXL's overflows in float16"
            )

    def said_target(self) -> str | None:
        found = build.generator_source(self.config)
        return found and found.diffusion_target

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        # The last time of a flow is 999, as flows on this family are trained; drawing has up to 1,000, as published.
        is_new = self.kept["last_flow_time"] == self.conventions["last_flow_time"]
        return build.process(
            self.config, loss_weight, self.config.offset_noise,
            steps=999 if is_new else 1000, min_sigma=self.config.min_sigma,
        )  # fmt: skip

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "autoencoder": partial(build.autoencoder, self.config),
            "text": partial(build.text_encoders, self.config, self.device),
        }

    @classmethod
    def keys_of_network(cls, config: SdConfig, network: str) -> tuple[str, ...]:
        projection = (PROJECTION,) if network == "text" and config.text_model == "t5" else ()
        return super().keys_of_network(config, network) + projection

    def network_files(self, network: str) -> list[Path]:
        return build.network_files(self.config, network)

    def texts_made_with(self, origin: Origin) -> dict[str, str]:
        own = {self.text_length: str(getattr(self.config, self.text_length))}
        return super().texts_made_with(origin) | own | self.said_skip

    def file_metadata(self) -> dict[str, str]:
        about = {TEXT_MODEL_KEY: self.config.text_model}
        if self.config.text_model == "t5":
            folder = projection_folder(self.config, TEXT_PROJECTION)
            about |= {TOKENS_KEY: str(self.config.text_tokens), PROJECTION_KEY: "file" if folder else "random"}
        return super().file_metadata() | about | self.said_skip

    @property
    def said_skip(self) -> dict[str, str]:
        """Which of CLIP's hidden states is read, where it is not the published one."""
        return {} if self.config.clip_skip is None else {SKIP_KEY: str(self.config.clip_skip)}

    def read_shape(self, name: str) -> Shape | None:
        unet = build.unet_config(self.config)
        width = unet.get("cross_attention_dim", 1280)
        known = {"moments": (2 * unet.get("in_channels", 4), None, None)}
        known |= {"text": (None, width)} if isinstance(width, int) else {}
        return known.get(name)

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return build.latents_of(self.config)

    @property
    def bucket_factor(self) -> int:
        return self.latents[1] * self.config.version.latent_factor

    @property
    def needs_geometry(self) -> bool:
        return self.config.version.sees_sizes

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
        config, autoencoder = self.config, self.networks["autoencoder"]
        sides = [self.drawing_conditions(texts, size) for texts in (prompts, [""] * len(prompts))]
        # As inference draws, whose flows end at other times than those of training.
        diffusion, times = build.sampling_process(config, config.sample_steps, config.sample_sampler)
        latents = draw_latents(
            diffusion, self.networks["generator"], *sides,
            (autoencoder.latent_channels, *(side // autoencoder.compression for side in size)),
            sample_seeds(config.seed, len(prompts)),
            steps=config.sample_steps, times=times, sampler=config.sample_sampler, guidance=config.sample_guidance,
            guidance_rescale=0.0,
        )  # fmt: skip
        return {"sample": to_pictures(autoencoder.decode(latents))}

    def drawing_conditions(self, texts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """What the U-Net is told to draw whole pictures of `size` (H, W)."""
        conditions = told(self.text_conditions(texts))
        sizes = {SIZES: whole_pictures(len(texts), size, self.device)} if self.needs_geometry else {}
        return conditions | sizes


def with_text_rates(config: SdFinetuneConfig) -> SdFinetuneConfig:
    """The config with a parameter group for each text encoder whose learning rate is its own."""
    patterns = {group.pattern for group in config.parameter_groups}
    rates = {f"text.encoders.{i}.*": rate for i, rate in enumerate(config.text_encoder_rates)}
    own = [
        ParameterGroup(pattern=pattern, lr_scale=rate / config.lr)
        for pattern, rate in rates.items()
        if rate != config.lr and pattern not in patterns  # which a resolved config already has
    ]
    return config.model_copy(update={"parameter_groups": [*config.parameter_groups, *own]})
