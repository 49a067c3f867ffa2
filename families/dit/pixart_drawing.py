"""Drawing with PixArt-alpha: text encoder, denoiser, autoencoder, one in memory at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from families.common.features import lengths_name
from families.common.pipeline import LatentPipeline, Size
from families.common.sampling import draw_latents
from families.common.transformer_lora import built_with
from families.dit import build, pixart_build
from families.dit.autoencoder import autoencoder, latents_of
from families.dit.pixart_conditions import FEATURE, own_empty_text, told, whole_pictures, without_text
from families.dit.training import latent_shape


class PixartNetworks(LatentPipeline):
    """The networks of a PixArt-alpha, each on the device only while it works; LoRAs are merged into one."""

    build_autoencoder = staticmethod(autoencoder)

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The text conditions of texts, by the denoiser's names."""
        length = self.settings.version.text_length
        return self.read_texts(
            pixart_build.text_encoder,
            texts,
            lambda hidden, lengths: told({FEATURE: hidden, lengths_name(FEATURE): lengths}, length),
        )

    def draw(
        self,
        prompts: Sequence[str],
        negative: str,
        size_px: Size,
        seeds: Sequence[int],
        *,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> list[Tensor]:
        """Draw scaled latents (C, h, w) of prompts, on the CPU.

        Args:
            negative: what guidance leads away from; the empty text is the network's own, where it has one.
            size_px: (H, W) of the pictures.
            noise: (N, C, h, w) to begin with; by default that of `seeds`.
            sampling: other arguments of `draw_latents`.
        """
        settings, texts = self.settings, list(dict.fromkeys([*prompts, negative]))
        read = self.read(texts)
        conditions = {name: rows[[texts.index(prompt) for prompt in prompts]] for name, rows in read.items()}
        if settings.version.sees_sizes:
            conditions |= whole_pictures(len(prompts), size_px, torch.device("cpu"))
        away = {name: rows[texts.index(negative), None] for name, rows in read.items()}
        diffusion = build.process(settings)
        with self.holding(
            "denoiser", partial(built_with, pixart_build.denoiser, self.loras, dtype=self.dtype)
        ) as network:
            own = own_empty_text(network)
            unconditional = without_text(conditions, None if negative or own is None else own.cpu(), away)
            shape = latent_shape(size_px, network.config.in_channels, latents_of(settings)[1])

            def made(rows: list[int]) -> Tensor:
                sides = (self.rows(side, rows) for side in (conditions, unconditional))
                begin = None if noise is None else noise[rows]
                return draw_latents(
                    diffusion, network, *sides, shape, [seeds[i] for i in rows], guidance_rescale=0.0,
                    initial_noise=begin, **sampling,
                )  # fmt: skip

            return self.in_batches("denoiser", [size_px] * len(seeds), made)
