"""Pictures with a hole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.filters.base import Filter, Filtered, load_state, read_state
from modules.filters.saliency import Saliency

SALIENCY_SIDE_PX = 240  # shorter side of the pictures that the saliency network was trained on
EDGE_BLUR = 0.028  # deviation of the blur that rounds a mask's outline, per shorter side: the published 21.5 px at 768


class InpaintFilter(Filter):
    """The picture, white where it is to be painted, and as a fourth channel where that is.

    In training the masks are random: the outline of what catches the eye, with the file of the saliency network, or
    strokes of a brush and boxes without it.

    thresold: [least, most] saliency from which on a position is masked (spelt as in the published configs).
    p_outpaint: share of the pictures of which everything else is masked: all but what catches the eye, or a box.
    """

    channels = 4
    least_side_px = 32

    def __init__(
        self,
        thresold: tuple[float, float] = (0.04, 0.4),
        p_outpaint: float = 0.4,
        saliency_checkpoint_path: Path | None = None,
    ):
        self.thresold, self.p_outpaint = tuple(thresold), p_outpaint
        self.saliency: nn.Module | None = None
        if saliency_checkpoint_path is not None:
            self.saliency = Saliency()
            advice = "It is modules/cnet_modules/inpainting/saliency_model.pt of github.com/Stability-AI/StableCascade"
            load_state(self.saliency, read_state(saliency_checkpoint_path, advice), saliency_checkpoint_path)
            self.on_device = True

    def to(self, device: torch.device | str, encoder: nn.Module | None = None) -> Self:
        if self.saliency is not None:
            self.saliency.to(device)
        return self

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return self.masked(
            images, self._strokes(images, rngs) if self.saliency is None else self._salient(images, rngs)
        )

    def masked(self, images: Tensor, mask: Tensor) -> Filtered:
        """Pictures (B, 3, H, W), uint8 or floats in [0, 1], with a given mask (B, 1, H, W): true where to paint."""
        images = self.checked(images).to(mask.device)
        holes = torch.where(mask, torch.ones_like(images), images)
        return Filtered(torch.cat([holes, mask.float()], dim=1), holes)

    def _salient(self, images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
        height, width = images.shape[2:]
        scale = SALIENCY_SIDE_PX / min(height, width)
        size = round(height * scale), round(width * scale)
        device = next(self.saliency.parameters()).device
        saliency = self.saliency(F.interpolate(images.to(device), size=size, mode="bilinear", antialias=True))
        thresholds = [rng.uniform(*self.thresold) for rng in rngs]
        masks = torch.stack([one > threshold for one, threshold in zip(saliency, thresholds, strict=True)])
        masks = torch.stack([mask ^ (rng.random() < self.p_outpaint) for mask, rng in zip(masks, rngs, strict=True)])
        whole = F.interpolate(masks.float(), size=(height, width), mode="nearest")
        return _blurred(whole, EDGE_BLUR * min(height, width)) > 0.5

    def _strokes(self, images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
        height, width = images.shape[2:]
        masks = [
            ~_box(height, width, rng) if rng.random() < self.p_outpaint else _brushed(height, width, rng)
            for rng in rngs
        ]
        return torch.from_numpy(np.stack(masks)).unsqueeze(1).to(images.device)


def _brushed(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Where a brush went (arXiv:1806.03589, section 4): one to four chains of thick lines; (H, W) bool."""
    canvas = np.zeros((height, width), np.uint8)
    side = (height * width) ** 0.5
    for _ in range(rng.integers(1, 5)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        angle, thickness = rng.uniform(0, 2 * np.pi), max(1, round(rng.uniform(0.05, 0.2) * side))
        for _ in range(rng.integers(2, 9)):
            angle += rng.uniform(-1.5, 1.5)
            length = rng.uniform(0.1, 0.4) * side
            to_x, to_y = np.clip(x + length * np.cos(angle), 0, width), np.clip(y + length * np.sin(angle), 0, height)
            cv2.line(canvas, (int(x), int(y)), (int(to_x), int(to_y)), 1, thickness)
            x, y = to_x, to_y
    return canvas.astype(bool)


def _box(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A box of 0.3 to 0.8 of each side, anywhere; (H, W) bool."""
    canvas = np.zeros((height, width), bool)
    rows, columns = round(rng.uniform(0.3, 0.8) * height), round(rng.uniform(0.3, 0.8) * width)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    canvas[top : top + rows, left : left + columns] = True
    return canvas


def _blurred(masks: Tensor, deviation: float) -> Tensor:
    """A Gaussian blur of (B, 1, H, W), by rows and by columns.

    kornia's gives the same within 2e-7, but copies its kernel to a GPU in a way that waits for it.
    """
    reach = min(round(3 * deviation), min(masks.shape[2:]) - 1)
    places = torch.arange(-reach, reach + 1, device=masks.device)
    weights = torch.exp(-((places / deviation) ** 2) / 2)
    weights = weights / weights.sum()
    masks = F.pad(masks, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(masks, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
