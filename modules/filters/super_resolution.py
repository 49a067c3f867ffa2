"""Pictures with too few pixels."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.filters.base import Filter, Filtered


class SRFilter(Filter):
    """The picture with fewer pixels, by `scale_factor`, at its old size."""

    def __init__(self, scale_factor: float = 0.25):
        if not 0 < scale_factor < 1:
            raise ValueError(f"scale_factor {scale_factor} does not make pictures smaller: write a number in (0, 1)")
        self.scale_factor = scale_factor
        self.least_side_px = round(1 / scale_factor)

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        return self.enlarged(F.interpolate(images, scale_factor=self.scale_factor, mode="nearest"), images.shape[2:])

    def enlarged(self, small: Tensor, size: tuple[int, int]) -> Filtered:
        """Of pictures (B, 3, h, w), floats in [0, 1], that have few pixels already, for drawings of `size` (H, W)."""
        images = F.interpolate(small, size=tuple(size), mode="nearest")
        return Filtered(images, images)


class SREffnetFilter(SRFilter):
    """The latents of the picture with fewer pixels, as many of them as the picture itself has."""

    channels = 16
    on_device = True
    needs_encoder = True

    def __init__(self, scale_factor: float = 0.5):
        super().__init__(scale_factor)
        self.encoder: nn.Module | None = None
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str, encoder: nn.Module | None = None) -> Self:
        self.device, self.encoder = device, encoder
        return self

    def enlarged(self, small: Tensor, size: tuple[int, int]) -> Filtered:
        if self.encoder is None:
            raise ValueError("SREffnetFilter looks through the encoder of Stage C's latents: call `to` with it first")
        from modules.effnet import normalise_images  # brings torchvision, which the workers do without

        dtype = next(self.encoder.parameters()).dtype
        latents = self.encoder(normalise_images(small.to(self.device)).to(dtype))
        latents = F.interpolate(latents, scale_factor=1 / self.scale_factor, mode="nearest")
        return Filtered(latents.float(), super().enlarged(small, size).picture)
