"""How large the pictures are that DiT and PixArt-alpha draw."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, PositiveInt, model_validator

from families.common.drawn_pictures import GUIDED, DrawingConfig
from families.dit.autoencoder import latents_of
from warpcore.config_keys import SidePx
from warpcore.errors import UserError


def _resolution(name: str) -> str:
    if not re.fullmatch(r"[1-9]\d{1,3}p?", name):
        raise ValueError("write the height of a picture of 16:9, such as 480p, or the side of a square, such as 512")
    return name


class PictureSizeSettings(DrawingConfig):
    """The keys that say it, and how many channels are guided."""

    needs = {"guidance_channels": GUIDED}

    image_size: SidePx | None = None
    """Side of a square picture in pixels; other shapes get about the same area. By default that of the training, which
    the weights tell."""
    resolution: Annotated[str, AfterValidator(_resolution)] | None = None
    """The same by name, as Open-Sora has it: `480p` is the area of 480 x 853 px, of which a square has sides of 640;
    `512` is that of 512 x 512."""
    guidance_channels: PositiveInt | None = None
    """Guide the first of this number of channels only, by default as published: three of four with `iddpm`, and with
    DiT's other samplers but `dpm-solver`; else all."""

    @model_validator(mode="before")
    @classmethod
    def _resolution_is_text(cls, values: dict[str, Any]) -> dict[str, Any]:
        named = values.get("resolution")
        return values | {"resolution": str(named)} if type(named) is int else values

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [key for key in ("image_size", "resolution", "size") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} all say the size of pictures; remove all but one")
        if self.size and self.aspect_ratio:
            raise ValueError("size and aspect_ratio both say the shape of pictures; remove one")
        channels = self.version.network["in_channels"]
        if (self.guidance_channels or 0) > channels:
            raise ValueError(f"guidance_channels: {self.guidance_channels} of {channels} channels: write fewer")
        return self

    @property
    def trained_size(self) -> int:
        """Side in pixels of the squares that the weights were trained with, or of such an area."""
        return self.version.image_size

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of this."""
        return latents_of(self)[1] * self.version.network["patch_size"]

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures: what `size` says, else sides that the network can draw, of about the area.

        Raises:
            UserError: `size` has sides that it cannot draw.
        """
        factor = self.factor
        if self.size:
            if any(side % factor for side in self.size):
                height, width = self.size
                raise UserError(f"size: {height} x {width} px (height x width); sides are multiples of {factor} px")
            return self.size
        side = self.image_size or (self.trained_size if self.resolution is None else named_side(self.resolution))
        ratio = self.aspect_ratio or self.default_aspect_ratio
        height, width = (max(round(one / factor), 1) * factor for one in (side / ratio**0.5, side * ratio**0.5))
        return height, width


def named_side(name: str) -> float:
    """Side in px of the square of a resolution's area: with a `p` it is that of 16:9 with this height."""
    return int(name.removesuffix("p")) * (4 / 3 if name.endswith("p") else 1)
