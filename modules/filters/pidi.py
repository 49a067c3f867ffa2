"""Soft edges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.filters.base import Filter, Filtered, load_state, read_state
from modules.filters.pidinet import PiDiNet
from modules.filters.qr import disc

THRESHOLDS = (0.05, 0.7)  # of an edge, where they are made black and white


class PidiFilter(Filter):
    """The edges that PiDiNet finds, thickened and made black and white at random thresholds: like drawn lines.

    checkpoint_path: its weights. resize: side of the square that the picture is squeezed into before; null leaves it.
    dilation_kernels: sizes in px of round brushes, of which one is drawn (0 for none). binarize: whether to make them
    black and white.
    """

    channels = 1
    least_side_px = 8
    on_device = True

    def __init__(
        self,
        checkpoint_path: Path = Path("models/table5_pidinet.pth"),
        resize: int | None = 224,
        dilation_kernels: Sequence[int] = (0, 3, 5, 7, 9),
        binarize: bool = True,
    ):
        self.resize, self.dilation_kernels, self.binarize = resize, list(dilation_kernels), binarize
        self.network = PiDiNet()
        advice = "Weights of PiDiNet: table5_pidinet.pth of huggingface.co/lllyasviel/Annotators; then checkpoint_path"
        load_state(self.network, read_state(checkpoint_path, advice), checkpoint_path)

    def to(self, device: torch.device | str, encoder: nn.Module | None = None) -> Self:
        self.network.to(device)
        return self

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        size = images.shape[2:]
        images = images.to(self.network.classifier.weight.device)
        if self.resize is not None:
            images = F.interpolate(images, size=(self.resize, self.resize), mode="bilinear")
        rngs = [np.random.default_rng(seed) for seed in seeds]
        edges = self.network(images)
        edges = torch.stack(
            [_dilated(edge, rng.choice(self.dilation_kernels)) for edge, rng in zip(edges, rngs, strict=True)]
        )
        if self.binarize:
            drawn = [edge > rng.uniform(*THRESHOLDS) for edge, rng in zip(edges, rngs, strict=True)]
            edges = torch.stack(drawn).float()
        if self.resize is not None:
            edges = F.interpolate(edges, size=size, mode="bilinear")
        return Filtered.grey(edges)


def _dilated(edge: Tensor, size: int) -> Tensor:
    """The largest value of (1, H, W) within a disc around each pixel.

    kornia's dilation gives the same, but wants the disc as a tensor on the GPU, whose copy waits for it.
    """
    if not size:
        return edge
    padded, (height, width) = F.pad(edge, (size // 2,) * 4), edge.shape[1:]
    shifted = [padded[:, y : y + height, x : x + width] for y, x in np.argwhere(disc(size))]
    return torch.stack(shifted).amax(dim=0)
