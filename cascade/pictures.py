"""Between the tensors of the networks and pictures for people."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """uint8 (B, 3, H, W) on any device -> (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(images: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """Floats (B, 3, H, W), in [0, 1] where they are colours -> uint8 (B, H, W, 3), enlarged to `size` (H, W)."""
    images = images.float()
    if size is not None and images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return to_uint8((images.clamp(0, 1) * 255).round().byte())
