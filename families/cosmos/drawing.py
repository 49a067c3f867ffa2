"""Drawing with Cosmos-Predict2: text encoder, denoiser, autoencoder, one in memory at a time."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from families.common.pipeline import LatentPipeline, Size
from families.common.t5 import padded
from families.common.transformer_lora import built_with
from families.cosmos import build
from families.cosmos.sampling import draw
from families.cosmos.training import TEXT


class CosmosNetworks(LatentPipeline):
    """The networks of a Cosmos-Predict2, each on the device only while it works; LoRAs are merged into one."""

    build_autoencoder = staticmethod(build.autoencoder)

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The text conditions (N, L, D) of texts, by the denoiser's name; zeros of the empty one."""
        length = self.settings.version.text_length
        return self.read_texts(
            build.text_encoder, texts, lambda hidden, lengths: {TEXT: padded(hidden.float(), length)}
        )

    def draw(
        self,
        conditions: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        size: Size,
        seeds: Sequence[int],
        *,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> list[Tensor]:
        """Draw scaled latents (C, h, w), on the CPU.

        Args:
            conditions: of the denoiser, (N, ...) each.
            unconditional: the same, for guidance.
            size: (h, w) of the latents.
            noise: (N, C, h, w) to begin with; by default that of `seeds`, which are the same on any machine.
            sampling: other arguments of `families.cosmos.sampling.draw`.
        """
        with self.holding("denoiser", partial(built_with, build.transformer, self.loras, dtype=self.dtype)) as network:
            diffusion, shape = build.process(self.settings), (network.config.in_channels, *size)

            def made(rows: list[int]) -> Tensor:
                sides = (self.rows(side, rows) for side in (conditions, unconditional))
                begin = None if noise is None else noise[rows]
                return draw(
                    diffusion, network, *sides, shape, [seeds[i] for i in rows], initial_noise=begin, **sampling
                )

            return self.in_batches("denoiser", [size] * len(seeds), made)
