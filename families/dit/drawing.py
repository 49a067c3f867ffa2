"""Drawing with a DiT: denoiser, then autoencoder, one in memory at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from families.common.pipeline import LatentPipeline, Size
from families.common.sampling import draw_latents
from families.dit import build
from families.dit.autoencoder import autoencoder, latents_of
from families.dit.classes import class_conditions
from families.dit.training import latent_shape


class DitNetworks(LatentPipeline):
    """A DiT and its autoencoder, each on the device only while it works."""

    build_autoencoder = staticmethod(autoencoder)

    def draw(
        self,
        labels: Sequence[int],
        size_px: Size,
        seeds: Sequence[int],
        *,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> list[Tensor]:
        """Draw scaled latents (C, h, w) of classes, on the CPU.

        Args:
            size_px: (H, W) of the pictures.
            noise: (N, C, h, w) to begin with; by default that of `seeds`.
            sampling: other arguments of `draw_latents`.
        """
        settings = self.settings
        shape = latent_shape(size_px, settings.version.network["in_channels"], latents_of(settings)[1])
        diffusion = build.process(settings)
        with self.holding("denoiser", partial(build.dit, size_px=size_px, dtype=self.dtype)) as network:

            def made(rows: list[int]) -> Tensor:
                conditions = class_conditions([labels[i] for i in rows], settings.num_classes, self.device)
                begin = None if noise is None else noise[rows]
                return draw_latents(
                    diffusion, network, *conditions, shape, [seeds[i] for i in rows],
                    guidance_rescale=0.0, initial_noise=begin, **sampling,
                )  # fmt: skip

            return self.in_batches("denoiser", [size_px] * len(seeds), made)
