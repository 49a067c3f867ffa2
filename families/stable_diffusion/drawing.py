"""Drawing with Stable Diffusion: text encoders, U-Net, autoencoder, one in memory at a time."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from families.common.lora import draw_with
from families.common.lora_training import add_tokens
from families.common.pipeline import LatentPipeline, Size
from families.common.precision import freeze
from families.common.sampling import draw_latents
from families.common.text_encoders import ClipTextEncoders
from families.stable_diffusion import build
from families.stable_diffusion.conditions import SIZES, told
from families.stable_diffusion.lora import UNET, Loras, encoders_by_name, merge, of_network
from families.stable_diffusion.t5_layers import T5Texts
from warpcore.diffusion.diffusion import GDF


class StableDiffusionNetworks(LatentPipeline):
    """The networks of a Stable Diffusion, each on the device only while it works; LoRAs are merged into them."""

    build_autoencoder = staticmethod(build.autoencoder)

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The U-Net's text conditions (N, ...) of texts, by its names."""
        with self.holding("text encoders", partial(text_encoders, loras=self.loras, device=self.device)) as encoders:
            for name, encoder in encoders_by_name(encoders).items():
                add_tokens(encoder, of_network(self.loras, name))
            most = self.settings.batch_size
            parts = [encoders(texts[start : start + most]) for start in range(0, len(texts), most)]
        features = {"text": torch.cat([part.hidden.cpu() for part in parts])}
        if self.settings.version.sees_sizes:
            features["text_pooled"] = torch.cat([part.pooled.cpu() for part in parts])
        return told(features)

    def encode(self, picture: Tensor) -> Tensor:
        """Scaled latents (C, h, w), on the CPU, of a picture (3, H, W) in [0, 1]: the mean of its moments."""
        with self.holding("autoencoder", build.autoencoder) as autoencoder:
            moments = autoencoder.moments((picture[None] * 255).round().byte())
            return autoencoder.scale.latents(moments, None)[0].cpu()

    def draw(
        self,
        conditions: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        size: Size,
        seeds: Sequence[int],
        *,
        diffusion: GDF,
        start: Tensor | None = None,
        **sampling,
    ) -> list[Tensor]:
        """Draw scaled latents (C, h, w), on the CPU.

        Args:
            conditions: of the U-Net, (N, ...) each.
            unconditional: the same, for guidance.
            size: (h, w) of the latents.
            start: latents (C, h, w) to begin with, see `draw_latents`; **sampling are its other arguments.
        """
        with self.holding("U-Net", partial(build.unet, dtype=self.dtype)) as unet:
            draw_with(unet, of_network(self.loras, UNET))
            shape = (unet.config.in_channels, *size)

            def draw(rows: list[int]) -> Tensor:
                sides = (self.rows(side, rows) for side in (conditions, unconditional))
                begin = None if start is None else start.to(self.device).expand(len(rows), *shape)
                return draw_latents(diffusion, unet, *sides, shape, [seeds[i] for i in rows], start=begin, **sampling)

            return self.in_batches("U-Net", [size] * len(seeds), draw)


def text_encoders(settings, loras: Loras, device: torch.device) -> ClipTextEncoders | T5Texts:
    """The text encoders with what LoRAs change of them, in their precision."""
    precision = settings.text_encoder_precision
    changed = loras and settings.text_model == "clip"  # LoRAs change nothing of T5
    if changed and precision == "nf4":  # four bits cannot be changed: they are made of the changed weights
        settings = settings.model_copy(update={"text_encoder_precision": "bfloat16"})
    encoders = build.text_encoders(settings, device)
    for name, encoder in encoders_by_name(encoders).items():
        merge(loras, name, encoder.model)
        if precision != settings.text_encoder_precision:
            freeze(encoder.model, precision, build.TEXT, device)
    return encoders


def time_ids(original: Size, crop: tuple[int, int], size: Size) -> dict[str, Tensor]:
    """SDXL's six numbers (1, 6), as a condition: true size, top left corner of the crop, and size (H, W) in pixels."""
    return {SIZES: torch.tensor([[*original, *crop, *size]], dtype=torch.float32)}
