"""Light and dark."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.filters.base import Filter, Filtered

SHARE_OF_EXTREMES = 0.33  # of the range of brightness, at both ends


class QRFilter(Filter):
    """Where a picture is light (1), dark (0) or neither (0.5): what makes a QR code readable.

    resize: side of the square that the picture is squeezed into before; null leaves it. blobify: join specks to blobs,
    by a blur and a closing with a round kernel, their sizes in px drawn from `blur_kernels` and `dilation_kernels`
    (0 for none).
    """

    channels = 1
    least_side_px = 16

    def __init__(
        self,
        resize: int | None = 224,
        blobify: bool = True,
        dilation_kernels: Sequence[int] = (3, 5, 7),
        blur_kernels: Sequence[int] = (15,),
    ):
        if any(size and size % 2 == 0 for size in (*dilation_kernels, *blur_kernels)):
            raise ValueError("dilation_kernels and blur_kernels hold odd sizes, or 0 for none")
        self.resize, self.blobify = resize, blobify
        self.dilation_kernels, self.blur_kernels = list(dilation_kernels), list(blur_kernels)

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        size = images.shape[2:]
        brightness = images.amax(dim=1, keepdim=True)  # V of HSV
        if self.resize is not None:
            brightness = F.interpolate(brightness, size=(self.resize, self.resize), mode="bilinear")
        pictures = brightness[:, 0].cpu().numpy()
        made = [
            self._levels(picture, np.random.default_rng(seed)) for picture, seed in zip(pictures, seeds, strict=True)
        ]
        levels = torch.from_numpy(np.stack(made)).unsqueeze(1)
        if self.resize is not None:
            levels = F.interpolate(levels, size=size, mode="bilinear")
        return Filtered.grey(levels)

    def _levels(self, brightness: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.blobify:
            dilation, blur = rng.choice(self.dilation_kernels), rng.choice(self.blur_kernels)
            if blur:
                brightness = cv2.GaussianBlur(brightness, (int(blur), int(blur)), rng.uniform(0.1, 2.0))
            if dilation:
                brightness = cv2.morphologyEx(brightness, cv2.MORPH_CLOSE, disc(dilation))
        low, high = brightness.min(), brightness.max()
        margin = (high - low) * SHARE_OF_EXTREMES
        light, dark = brightness > high - margin, brightness < low + margin
        return (1 + light.astype(np.float32) - dark) / 2


def disc(size: int) -> np.ndarray:
    """A round kernel (size, size) uint8: the squares whose middle is nearer than 0.55 of the size."""
    squares = np.linspace(-0.5, 0.5, size) ** 2
    return (squares[None] + squares[:, None] < 0.3).astype(np.uint8)
