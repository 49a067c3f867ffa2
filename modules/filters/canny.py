"""Edges."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.filters.base import Filter, Filtered


class CannyFilter(Filter):
    """Canny's edges (OpenCV's, of the colour picture): 1 on an edge, 0 beside it.

    resize: side of the square that the picture is squeezed into before, as published; null finds the edges at the
    picture's own size. low, high: thresholds of the gradient.

    OpenCV's on the CPU, not kornia's on the device: that one looks at the grey picture and measures the gradient in
    another way; on the golden pictures it misses 39% of the published filter's edge pixels at equal thresholds.
    """

    channels = 1
    least_side_px = 3

    def __init__(self, resize: int | None = 224, low: float = 100, high: float = 200):
        self.resize, self.low, self.high = resize, low, high

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        size = images.shape[2:]
        if self.resize is not None:
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear")
        pictures = images.mul(255).permute(0, 2, 3, 1).byte().cpu().numpy()
        edges = np.stack([cv2.Canny(np.ascontiguousarray(picture), self.low, self.high) for picture in pictures])
        edges = torch.from_numpy(edges).unsqueeze(1) / 255
        if self.resize is not None:
            edges = F.interpolate(edges, size=size, mode="bilinear")
        return Filtered.grey(edges)
