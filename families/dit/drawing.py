"""Drawing with a DiT or a Latte: denoiser, then autoencoder, one in memory at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from families.common.classes import label_tensors
from families.common.clips import decoded_clips
from families.common.pipeline import LatentPipeline
from families.common.sampling import draw_latents
from families.dit import build
from families.dit.autoencoder import autoencoder, latents_of
from families.dit.training import latent_shape


class DitNetworks(LatentPipeline):
    """A DiT and its autoencoder, each on the device only while it works."""

    build_autoencoder = staticmethod(autoencoder)

    def draw(
        self,
        labels: Sequence[int],
        size: Sequence[int],
        seeds: Sequence[int],
        *,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> list[Tensor]:
        """Draw scaled latents (C, h, w) or (C, T, h, w) of classes, on the CPU.

        Args:
            size: (H, W) of the pictures in px, or (T, H, W) of the clips.
            noise: (N, C, h, w) to begin with; by default that of `seeds`.
            sampling: other arguments of `draw_latents`.
        """
        settings = self.settings
        shape = latent_shape(size, settings.version.network["in_channels"], latents_of(settings)[1])
        diffusion = build.process(settings)
        with self.holding("denoiser", partial(build.dit, size_px=size[-2:], dtype=self.dtype)) as network:

            def made(rows: list[int]) -> Tensor:
                told = label_tensors([labels[i] for i in rows], settings.num_classes, self.device)
                begin = None if noise is None else noise[rows]
                return draw_latents(
                    diffusion, network, *({"y": one} for one in told), shape, [seeds[i] for i in rows],
                    guidance_rescale=0.0, initial_noise=begin, **sampling,
                )  # fmt: skip

            return self.in_batches("denoiser", [tuple(size)] * len(seeds), made)


class LatteNetworks(DitNetworks):
    """A Latte and its autoencoder."""

    def decode(self, latents: Sequence[Tensor], tiled: bool = False) -> list[Tensor]:
        """Clips (T, 3, H, W) in [0, 1] of scaled latents (C, T, h, w)."""
        with self.holding("autoencoder", self.build_autoencoder) as autoencoder:
            autoencoder.tiling = tiled
            return self.in_batches(
                "autoencoder",
                [tuple(one.shape) for one in latents],
                lambda rows: decoded_clips(
                    autoencoder, self.batch(latents, rows, torch.float32), self.settings.autoencoder_frames
                ),
            )
