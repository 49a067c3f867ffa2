"""What the U-Net is told beside noised latents and times."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from warpcore.data.geometry import CropGeometry
from warpcore.transfer import to_device

TEXT = {"text": "encoder_hidden_states", "text_pooled": "text_embeds"}
"""Features of texts, (B, L, D) and SDXL's (B, P), and what the U-Net calls them."""
SIZES = "time_ids"
"""What it calls SDXL's six numbers: height and width of the whole picture, top and left of the crop, and height and
width of the crop (arXiv:2307.01952, section 2.2)."""


def told(texts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features of texts by the names of the U-Net's conditions, in float32."""
    return {name: texts[feature].float() for feature, name in TEXT.items() if feature in texts}


def sizes_of(geometry: CropGeometry) -> Tensor:
    """The six numbers (B, 6) of the pictures of a batch."""
    return torch.cat([geometry.source, geometry.crop, geometry.size], dim=1).float()


def whole_pictures(count: int, size: Sequence[int], device: torch.device) -> Tensor:
    """The six numbers (B, 6) of `count` pictures of `size` (H, W) that were not cropped."""
    return to_device(torch.tensor([*size, 0, 0, *size], dtype=torch.float32), device).expand(count, -1)
