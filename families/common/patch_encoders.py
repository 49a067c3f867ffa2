"""Frozen image encoders that say something of each patch of a picture: DINOv2 (arXiv:2304.07193) and CLIP towers."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.common.library_files import built, construct, fill, read_config, read_tensors
from modules.clip import ClipSettings, ImageTower, image_tower, tower_settings
from modules.clip_weights import read_settings
from modules.effnet import normalise_images
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.text import brief

T = TypeVar("T")
TOWER_WIDTH = 768
"""Of an image tower whose settings do not say it, as in open_clip."""

PUBLISHED_NAMES = {
    "attention.attention.query.": "attention.q_proj.", "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.", "attention.output.dense.": "attention.o_proj.",
}  # fmt: skip
"""Layers of DINOv2, as files call them, and as newer versions of transformers do."""


class PatchEncoder(nn.Module):
    """Pictures (B, 3, H, W) uint8 and a grid (rows, columns) -> patches (B, rows * columns, D) float32, row by row.

    Whole pictures are stretched so that a place of the grid is a patch. Attribute: `width` D.
    """

    width: int

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        raise NotImplementedError


class Dinov2Patches(PatchEncoder):
    """DINOv2 of transformers: its last hidden states after the final norm.

    Args:
        config: of transformers' Dinov2Model. key: the config key that an error names.
    """

    def __init__(self, config: dict[str, Any], key: str):
        super().__init__()
        from transformers import Dinov2Model

        settings = dinov2_settings(config, key)
        self.model = built(partial(Dinov2Model, settings), Dinov2Model.__name__, key).eval()
        self.width = settings.hidden_size

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        patch = self.model.config.patch_size
        # As in the published training of REPA: 256 px become 224, without a filter.
        size = [side * patch for side in grid]
        pixels = F.interpolate(normalise_images(images.float() / 255), size, mode="bicubic", align_corners=False)
        made = self.model(pixel_values=pixels.to(self.model.layernorm.weight.dtype))
        return made.last_hidden_state[:, 1:].float()


class TowerPatches(PatchEncoder):
    """A CLIP image tower, such as the mini one that ships."""

    def __init__(self, tower: ImageTower):
        super().__init__()
        self.tower, self.width = tower, tower.width

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.tower.patches(images.float() / 255, grid).float()


def dinov2_settings(config: dict[str, Any], key: str) -> Any:
    """transformers' Dinov2Config. Raises UserError where a config is none."""
    from transformers import Dinov2Config

    if (kind := config.get("model_type", "dinov2")) != "dinov2":
        raise UserError(f"{key}: its config is that of {brief(kind)}, not of dinov2")
    settings = construct(Dinov2Config, config, key)
    if not isinstance(settings.patch_size, int):
        raise UserError(f"{key}: its patches are {brief(settings.patch_size)} px; only square ones are supported")
    return settings


def patch_encoder(path: Path, key: str) -> PatchEncoder:
    """The encoder in a folder of transformers (DINOv2), or in the file of an image tower.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    config = _dinov2_config(path, key)
    if config is None:
        settings = _tower_settings(path, key)
        if are_only_shapes():
            with torch.device("meta"):
                return TowerPatches(ImageTower(settings))
        return TowerPatches(_read(partial(image_tower, path=path, settings=settings), key))
    with torch.device("meta"):
        encoder = Dinov2Patches(config, key)
    if not are_only_shapes():
        tensors = _library_names(read_tensors(path, key), encoder.model)
        fill(encoder.model, tensors, path, key, torch.float32)
    return encoder


def _library_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file by their names in the installed version of transformers."""
    here, named = model.state_dict().keys(), {}
    for name, tensor in tensors.items():
        newer = name
        for published, own in PUBLISHED_NAMES.items():
            newer = newer.replace(published, own)
        named[newer if newer in here else name] = tensor
    return named


def patch_width(path: Path, key: str) -> int:
    """D of the encoder that `patch_encoder` gives, whose weights are not read; errors as there."""
    config = _dinov2_config(path, key)
    if config is not None:
        return dinov2_settings(config, key).hidden_size
    return _tower_settings(path, key).vision_cfg.get("width", TOWER_WIDTH)


def _dinov2_config(path: Path, key: str) -> dict[str, Any] | None:
    """The config of a DINOv2; None for the file of an image tower."""
    if are_only_shapes() and not path.exists():
        return {}  # of the base size
    config = read_config(path, key)
    if config is None and (path.is_dir() or _read(partial(read_settings, path), key) is None):
        raise UserError(
            f"{key}: {path} is neither a folder of transformers with a DINOv2 (config.json), nor the file of an image "
            "tower as train/train_towers.py writes it"
        )
    return config


def _tower_settings(path: Path, key: str) -> ClipSettings:
    settings = _read(partial(tower_settings, path=path), key)
    if settings.vision_cfg is None:
        raise UserError(f"{key}: {path} holds a text tower; name the file of an image tower")
    return settings


def _read(function: Callable[[], T], key: str) -> T:
    """What a function of `modules.clip` gives; its errors are those of the user who named the file in `key`."""
    try:
        return function()
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {error}") from None
