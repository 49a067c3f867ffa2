"""Further members of a sample that a use case asks for: how each is decoded, and stacked to a batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from warpcore.data import images
from warpcore.data.geometry import drawn_variant
from warpcore.data.images import Geometry
from warpcore.data.samples import Sample
from warpcore.errors import UserError


class BadMember(Exception):
    """A `Field` finds the content of its member unusable, which makes the sample a bad one; the message says why."""


class Field(Protocol):
    """A further member that a use case wants of every sample. Picklable: it goes to every worker."""

    suffixes: tuple[str, ...]
    """Extensions without a leading dot, lower case; of several that a sample has, the first is read."""

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Any:
        """The value of one sample; tensors are stacked to a batch. Raises BadPicture or BadMember.

        `geometry` says how the sample's picture was resized and cropped; None where the run reads no pictures.
        """

    def blank(self, size: tuple[int, int]) -> Any:
        """What stands in for the value where no sample of a micro-batch of bucket `size` (H, W) is readable."""

    # A field that does without its member may have `optional`: that member, and the option of the config that wants
    # it (see `warpcore.data.optional_members`). One whose member a key of the config names may have `named_by`: that
    # key, for the message where no sample has the member.


@dataclass(frozen=True)
class PictureField:
    """A picture that belongs to the sample's picture, such as its mask: uint8 (C, H, W) with the same crop."""

    suffixes: tuple[str, ...]
    channels: int = 1
    """1: grey; 3: RGB."""

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Tensor:
        if geometry is None:
            raise UserError(f".{self.suffixes[0]} is cropped like its picture, but this run reads no pictures")
        pixels = images.decode_alike(data, geometry)
        if self.channels == 1:
            pixels = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def blank(self, size: tuple[int, int]) -> Tensor:
        return torch.zeros(self.channels, *size, dtype=torch.uint8)


@dataclass(frozen=True)
class TensorField:
    """A tensor stored as `NAME.npy`, such as what a frozen network made of the sample.

    Of several variants, `NAME.npy`, `NAME.1.npy`, ..., the sample's seed chooses one.
    """

    name: str
    shapes: Mapping[tuple[int, int], tuple[int, ...]]
    """Shape of the tensor by bucket (H, W): zeros of it stand in where nothing is readable. What depends on captions
    alone has one shape, whatever the bucket."""
    variants: int = 1
    bfloat16: bool = False
    """Its bits are stored as 16-bit integers, as .npy knows no bfloat16."""
    lengths: str | None = None
    """Where samples differ in the size of the first dimension: the name in `Batch.extra` of their sizes, int64 (B,).
    The tensors themselves are padded with zeros at their ends to the longest one of the batch."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (variant_member(self.name, 0),)

    def suffixes_of(self, sample: Sample) -> tuple[str, ...]:
        """The member of the variant that is drawn."""
        return (variant_member(self.name, drawn_variant(sample, self.variants)),)

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Tensor:
        try:
            array = np.load(BytesIO(data), allow_pickle=False)
            tensor = torch.from_numpy(array.view(np.int16) if self.bfloat16 else array)
        except (ValueError, TypeError, EOFError) as error:
            raise BadMember(f"it holds no tensor: {error}") from error
        return tensor.view(torch.bfloat16) if self.bfloat16 else tensor

    def blank(self, size: tuple[int, int]) -> Tensor:
        return torch.zeros(self.shapes.get(size) or next(iter(self.shapes.values())))


def naming_keys(fields: Iterable[Any]) -> dict[str, str]:
    """First extension -> the config key that names the member, of those fields that know it."""
    return {one.suffixes[0]: one.named_by for one in fields if getattr(one, "named_by", None)}


def variant_member(name: str, variant: int) -> str:
    """The extension of a variant of a stored tensor."""
    return f"{name}.{variant}.npy" if variant else f"{name}.npy"


def wanted(one: Field, sample: Sample) -> tuple[str, ...]:
    """The suffixes of a field for a sample."""
    return one.suffixes_of(sample) if isinstance(one, TensorField) else one.suffixes


def collate(fields: Mapping[str, Field], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `Batch.extra` holds of these fields, given the values of each sample by name.

    Tensors of equal shapes are stacked to (B, ...), and those of a `TensorField` with `lengths` padded before; of what
    else there is, a list.
    """
    extra: dict[str, Any] = {}
    for name, one in fields.items():
        found = [of_sample[name] for of_sample in values]
        if isinstance(one, TensorField) and one.lengths:
            extra[name] = pad_sequence(found, batch_first=True)
            extra[one.lengths] = torch.tensor([len(value) for value in found])
        else:
            extra[name] = _stacked(found)
    return extra


def _stacked(values: list[Any]) -> Tensor | list[Any]:
    if all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return values
