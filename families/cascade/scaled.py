"""The encoder's latents of pictures that are scaled down first, each by its own factor: what Stage B learns from."""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.blocks import resize
from modules.effnet import EfficientNetEncoder, normalise_images
from warpcore.transfer import to_device


def encode_scaled(
    encoder: EfficientNetEncoder, pictures: Tensor, factors: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """Latents (16, h, w), float32, of each of the pictures (B, 3, H, W) in [0, 1], scaled to sides that the encoder
    divides."""
    sizes = [tuple(_multiple(side * factor, encoder.compression) for side in pictures.shape[2:]) for factor in factors]
    latents: dict[int, Tensor] = {}
    for rows in _alike(sizes):
        chosen = torch.stack([pictures[row] for row in rows])  # a list as the index would be copied to the device
        small = F.interpolate(chosen, sizes[rows[0]], mode="bilinear", antialias=True)
        latents |= zip(rows, encoder(normalise_images(small).to(dtype)).float(), strict=True)
    return [latents[row] for row in range(len(sizes))]


def enlarge(latents: Sequence[Tensor], positions: Sequence[int], device: torch.device) -> Tensor:
    """Latents (16, h, w) at as many positions (B, 16, H, W) as Stage B has, as it would enlarge them itself."""

    enlarged: dict[int, Tensor] = {}
    for rows in _alike([one.shape for one in latents]):
        chosen = to_device(torch.stack([latents[row] for row in rows]), device).float()
        enlarged |= zip(rows, resize(chosen.permute(0, 2, 3, 1), tuple(positions)).permute(0, 3, 1, 2), strict=True)
    return torch.stack([enlarged[row] for row in range(len(latents))])


def _alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The rows of each kind, in the order in which the kinds first occur."""
    return [[row for row, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]


def _multiple(length: float, of: int) -> int:
    return max(1, round(length / of)) * of
