"""Between the tensors of the networks, pictures to look at, and files."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from torch import Tensor

from modules.autocast import without_autocast
from warpcore.data.images import BadPicture, decode
from warpcore.data.member_headers import picture_size
from warpcore.errors import UserError
from warpcore.files import read_bytes

SSIM_LEAST_PX = 6
"""The shortest side of a picture that the window of SSIM, 11 px wide, can be moved over."""


def to_uint8(images: Tensor) -> np.ndarray:
    """uint8 (..., 3, H, W) on any device -> (..., H, W, 3)."""
    return images.movedim(-3, -1).cpu().numpy()


def to_pictures(images: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """Floats (..., 3, H, W), in [0, 1] where they are colours -> uint8 (..., H, W, 3).

    size: (H, W) to enlarge pictures (B, 3, H, W) to.
    """
    images = images.float().clamp(0, 1)
    if size is not None and images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return to_uint8((images.clamp(0, 1) * 255).round().byte())


def image_metrics(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """`psnr` (B,) in dB and `ssim` (B,) of pictures (B, 3, H, W); colours are in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pairs = list(zip(made.float().clamp(0, 1).split(1), true.float().split(1), strict=True))
    extended = [tuple(_at_least(one, SSIM_LEAST_PX) for one in pair) for pair in pairs]
    psnr = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    # Variances are small differences of large numbers, which 16 bits cannot hold.
    with without_autocast(made.device):
        ssim = [structural_similarity_index_measure(*pair, data_range=1.0) for pair in extended]
    return {"psnr": torch.stack(psnr), "ssim": torch.stack(ssim)}


def _at_least(picture: Tensor, side: int) -> Tensor:
    """(1, 3, H, W) with its last row and column repeated until no side is shorter than `side`."""
    missing = [max(0, side - own) for own in picture.shape[2:]]
    return F.pad(picture, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else picture


def pad(picture: Tensor, factor: int) -> Tensor:
    """(..., 3, H, W) with its last row and column repeated until `factor` divides both sides."""
    return F.pad(picture, (0, -picture.shape[-1] % factor, 0, -picture.shape[-2] % factor), mode="replicate")


def size_of(path: Path) -> tuple[int, int]:
    """(H, W) in pixels of the picture in a file, upright.

    Raises:
        UserError: it is no picture.
    """
    try:
        return picture_size(io.BytesIO(read_bytes(path)))[::-1]
    except UnidentifiedImageError as error:
        raise UserError(f"{path} cannot be read as a picture: it is of no known format") from error
    except Exception as error:  # Pillow's readers meet broken bytes with exceptions of many kinds
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """The picture in a file, (3, H, W) in [0, 1]: scaled to cover `size` (H, W) and its middle cut out, if given.

    Raises:
        UserError: it is no picture, or a broken one.
    """
    try:
        pixels = decode(read_bytes(path), size or size_of(path)).pixels
    except BadPicture as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255
