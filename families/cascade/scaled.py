"""The encoder's latents of pictures that are scaled down first, each by its own factor: what Stage B learns from."""

from collections.abc import Callable, Hashable, Sequence

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

    def encode(rows: list[int]) -> Tensor:
        alike = torch.stack([pictures[row] for row in rows])  # a list as the index would be copied to the device
        small = F.interpolate(alike, sizes[rows[0]], mode="bilinear", antialias=True)
        return encoder(normalise_images(small).to(dtype)).float()

    return _in_groups(sizes, encode)


def enlarge(latents: Sequence[Tensor], positions: Sequence[int], device: torch.device) -> Tensor:
    """Latents (16, h, w) at as many positions (B, 16, H, W) as Stage B has, as it would enlarge them itself."""

    def resized(rows: list[int]) -> Tensor:
        alike = to_device(torch.stack([latents[row] for row in rows]), device).float()
        return resize(alike.permute(0, 2, 3, 1), tuple(positions)).permute(0, 3, 1, 2)

    return torch.stack(_in_groups([one.shape for one in latents], resized))


def _in_groups(kinds: Sequence[Hashable], make: Callable[[list[int]], Tensor]) -> list[Tensor]:
    """What `make` gives for rows, one tensor for each row of `kinds`; those of the same kind are made together."""
    made: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        made |= zip(rows, make(rows), strict=True)
    return [made[row] for row in range(len(kinds))]


def _multiple(length: float, of: int) -> int:
    return max(1, round(length / of)) * of
