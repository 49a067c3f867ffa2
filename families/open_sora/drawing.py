"""Drawing with Open-Sora: text encoder, denoiser, autoencoder, one in memory at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from families.common.features import lengths_name
from families.common.pipeline import LatentPipeline
from families.common.transformer_lora import built_with
from families.open_sora import build
from families.open_sora.autoencoder import autoencoder, latents_of
from families.open_sora.conditions import FEATURE, Conditions, Denoiser, of_clips, told
from families.open_sora.sampling import draw_clips


class OpenSoraNetworks(LatentPipeline):
    """The networks of Open-Sora, each on the device only while it works; LoRAs are merged into one."""

    build_autoencoder = staticmethod(autoencoder)

    def read(self, texts: Sequence[str]) -> Conditions:
        """The text conditions of texts, by the denoiser's names, on the CPU."""
        length = self.settings.version.text_length
        return self.read_texts(
            build.text_encoder,
            texts,
            lambda hidden, lengths: told({FEATURE: hidden, lengths_name(FEATURE): lengths}, length),
        )

    def draw(
        self,
        prompts: Sequence[str],
        negative: str,
        size_px: Sequence[int],
        latent_frames: int,
        seeds: Sequence[int],
        *,
        fps: float,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> list[Tensor]:
        """Draw scaled latents (C, t, h, w) of prompts, on the CPU.

        Args:
            negative: what guidance leads away from; the empty text is the network's own.
            size_px: (T, H, W) of the clips. latent_frames: t.
            fps: frames per second, which the network is told.
            noise: (N, C, t, h, w) to begin with; by default that of `seeds`.
            sampling: other arguments of `draw_latents`.
        """
        settings, texts = self.settings, list(dict.fromkeys([*prompts, *([negative] if negative else [])]))
        read = self.read(texts)
        conditions = {name: rows[[texts.index(prompt) for prompt in prompts]] for name, rows in read.items()}
        conditions |= of_clips(size_px, torch.full((len(prompts),), fps))
        away = {name: rows[texts.index(negative), None] for name, rows in read.items()} if negative else None
        compression = latents_of(settings)[1]
        shape = (
            settings.version.network["in_channels"],
            latent_frames,
            *(side // compression for side in size_px[1:]),
        )
        diffusion, shift = build.process(settings), build.drawing_shift(settings, size_px, latent_frames)
        with self.holding("denoiser", partial(built_with, build.network, self.loras, dtype=self.dtype)) as network:
            denoiser = Denoiser(network, settings.version)

            def made(rows: list[int]) -> Tensor:
                own = self.rows(conditions, rows)
                begin = None if noise is None else noise[rows]
                beside = None if away is None else {k: v.to(self.device).expand_as(own[k]) for k, v in away.items()}
                return draw_clips(
                    diffusion, denoiser, own, shape, [seeds[i] for i in rows], away=beside, shift=shift,
                    initial_noise=begin, **sampling,
                )  # fmt: skip

            return self.in_batches("denoiser", [tuple(size_px)] * len(seeds), made)

    def decode_clips(self, latents: Sequence[Tensor], frames: int) -> list[Tensor]:
        """Clips (T, 3, H, W) in [0, 1] of scaled latents (C, t, h, w)."""
        with self.holding("autoencoder", self.build_autoencoder) as autoencoder:
            return self.in_batches(
                "autoencoder",
                [tuple(one.shape) for one in latents],
                lambda rows: autoencoder.decoded_clips(self.batch(latents, rows, torch.float32), frames),
            )
