"""What every filter of a ControlNet shares. Loader workers import this package, so it stays light."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from modules.pickled_weights import read_pickled_tensors
from modules.safetensors_files import load_weights


class Filtered(NamedTuple):
    """What a filter makes of pictures.

    condition: (B, channels, h, w) float32, for the ControlNet. picture: (B, 3, H, W) float32 in [0, 1], to look at.
    """

    condition: Tensor
    picture: Tensor

    @classmethod
    def grey(cls, condition: Tensor) -> Self:
        """A condition (B, 1, H, W) in [0, 1], which is a picture as well."""
        return cls(condition, condition.expand(-1, 3, -1, -1))


class Filter:
    """Makes the condition of a ControlNet of pictures: `filter(images, seeds)`.

    To add your own, subclass this where Python can import it, set `channels`, write `apply`, and name the class in the
    config: `controlnet_filter: my_package.my_module.MyFilter`. Arguments of its `__init__`, with their types, are what
    `controlnet_filter_params` may hold. A filter is sent to worker processes, so what it holds must be picklable.
    """

    channels: int = 3
    """Channels of the condition."""
    least_side_px: int = 1
    """Shorter side of the smallest pictures that it can use."""
    member: str | None = None
    """The member of each sample that is filtered, such as `depth.png`; None: the sample's picture itself."""
    on_device: bool = False
    """Whether it computes with a network, on the device of the run. Other filters run in the loader's workers."""
    needs_encoder: bool = False
    """Whether it looks through the encoder that makes Stage C's latents: `to` has to be called with that."""
    when_drawing: Mapping[str, Any] = {}
    """Arguments for drawing, after training, such as to leave out nothing by chance."""

    def __call__(self, images: Tensor, seeds: Sequence[int] | None = None) -> Filtered:
        """Filter pictures (B, 3, H, W), uint8 or floats in [0, 1].

        seeds: one for each picture, from which all randomness of the filter follows; by default 0, 1, ...

        Raises ValueError for pictures that it cannot use.
        """
        images = self.checked(images)
        return self.apply(images, range(len(images)) if seeds is None else seeds)

    def checked(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) as floats in [0, 1]. Raises ValueError for pictures that the filter cannot use."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{type(self).__name__} takes pictures (B, 3, H, W), not {tuple(images.shape)}")
        height, width = images.shape[2:]
        if min(height, width) < self.least_side_px:
            raise ValueError(
                f"{type(self).__name__} can't use pictures of {width} x {height} px: it needs at least "
                f"{self.least_side_px} px per side"
            )
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        """Filter pictures (B, 3, H, W), floats in [0, 1], with a seed for each: the condition, and what to look at."""
        raise NotImplementedError

    def ready(self, images: Tensor) -> Filtered:
        """Take pictures (B, 3, H, W) as they are, such as edges that someone drew.

        Raises ValueError where the condition is no picture.
        """
        images = self.checked(images)
        if self.channels not in (1, 3):
            raise ValueError(f"no picture shows the condition of {type(self).__name__}: {self.channels} channels")
        return Filtered(images, images) if self.channels == 3 else Filtered.grey(images.mean(dim=1, keepdim=True))

    def filter_batch(self, batch: Any, count: int | None = None) -> Filtered:
        """Filter the first `count` samples of a training batch, or all."""
        images = batch.images if self.member is None else batch.extra[self.member]
        return self(images[:count], batch.seeds[:count])

    def of_batch(self, batch: Any) -> Tensor:
        """The condition (B, channels, h, w) of a training batch: what the loader's workers call."""
        return self.filter_batch(batch).condition

    def to(self, device: torch.device | str, encoder: nn.Module | None = None) -> Self:
        """Move its networks. `encoder` makes Stage C's latents, for filters that need it."""
        return self


def read_state(path: Path | str, advice: str) -> dict[str, Tensor]:
    """The tensors of a weights file (.safetensors, or a PyTorch file read without running any code in it).

    Raises ValueError, with `advice` where the file is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. {advice}")
    try:
        if path.suffix == ".safetensors":
            return load_weights(path)
        return read_pickled_tensors(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


def load_state(network: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Load strictly, and freeze. Raises ValueError where names or shapes differ."""
    try:
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} was made for another network: {str(error).splitlines()[1].strip()}") from error
    network.eval().requires_grad_(False)
