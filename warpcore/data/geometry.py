"""How the pictures of a batch were resized and cropped: computed as they are decoded, or read from a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from warpcore.data.buckets import resized_size
from warpcore.data.images import BadPicture, Geometry
from warpcore.data.samples import PICTURE_FACTS, Sample
from warpcore.errors import UserError
from warpcore.random import stable_hash
from warpcore.safe_json import parse_json


@dataclass(frozen=True, slots=True)
class CropGeometry:
    """How the pictures of a batch came to their bucket, as SDXL's size and crop conditions want it (arXiv 2307.01952,
    section 2.2)."""

    values: torch.Tensor
    """int64 (B, 4, 2): `source`, `resized`, `crop` and `size` of each sample, in px."""

    @classmethod
    def of(cls, geometries: Sequence[Geometry]) -> Self:
        rows = [(one.source, one.resized, (one.top, one.left), one.size) for one in geometries]
        return cls(torch.tensor(rows, dtype=torch.int64))

    @property
    def source(self) -> torch.Tensor:
        """(B, 2): height and width of the whole picture, its EXIF rotation applied."""
        return self.values[:, 0]

    @property
    def resized(self) -> torch.Tensor:
        """(B, 2): height and width after resizing, before the crop."""
        return self.values[:, 1]

    @property
    def crop(self) -> torch.Tensor:
        """(B, 2): top and left of the crop in the resized picture."""
        return self.values[:, 2]

    @property
    def size(self) -> torch.Tensor:
        """(B, 2): height and width of the crop, which is the bucket."""
        return self.values[:, 3]


def stored_geometry(facts: bytes, sample: Sample, size: tuple[int, int], remedy: str) -> Geometry:
    """How the picture of a sample whose features were stored came to the bucket `size` (H, W).

    remedy: what a user does where that was not stored: the end of an error message.

    Raises:
        UserError: that was not stored.
        BadPicture: what was stored is damaged.
    """
    crops = _crops(facts)
    if not crops:
        raise UserError(
            f"{sample.tar_of(PICTURE_FACTS)[0]} does not say how its pictures were cropped, which this run wants to "
            f"know: it was made by an earlier version; {remedy}"
        )
    source, (top, left) = (sample.height, sample.width), crops[drawn_variant(sample, len(crops))]
    return Geometry(source, resized_size(*source, size), top, left, size)


def _crops(facts: bytes) -> list[list[int]] | None:
    try:
        crops = parse_json(facts).get("crops")
    except (ValueError, AttributeError) as error:
        raise BadPicture(f"it is damaged: {error}") from None
    if crops and not (isinstance(crops, list) and all(map(_is_corner, crops))):
        raise BadPicture("its crops are damaged")
    return crops


def _is_corner(crop: object) -> bool:
    """Whether it is [top, left] in px."""
    return isinstance(crop, list) and len(crop) == 2 and all(type(one) is int and 0 <= one < 2**31 for one in crop)


def drawn_variant(sample: Sample, variants: int) -> int:
    """Which of the variants of stored features a draw of a sample takes."""
    return stable_hash(sample.seed, "variant") % variants
