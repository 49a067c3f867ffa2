"""Drawing under the control of ControlNets: conditions from files, and Stage C with the residuals made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.common.pictures import read_picture, size_of
from families.common.poses import read_people
from modules.blocks import resize
from modules.filters import Filter, Filtered
from modules.filters.inpaint import InpaintFilter
from modules.filters.pose import draw_people
from modules.filters.super_resolution import SRFilter
from modules.stage_c import StageC
from warpcore.config import ConfigError
from warpcore.data.images import BadPicture, decode_alike, place
from warpcore.diffusion.diffusion import GDF
from warpcore.errors import UserError
from warpcore.files import read_bytes

Size = tuple[int, int]
Margins = float | tuple[float, float, float, float]


def condition_of_file(
    filter: Filter,
    path: Path,
    size: Size,
    *,
    mask: Path | None = None,
    margins: Margins | None = None,
    ready: bool = False,
) -> Filtered:
    """The condition, of a batch of one, that a filter makes of a picture for a drawing of `size` (H, W).

    Args:
        path: the picture, scaled to cover `size` and cropped; for poses, key points (.json) or a drawn skeleton; for
            super-resolution, one of few pixels.
        mask: for inpainting, a picture of the same shape that is light where to paint.
        margins: for inpainting, how much to paint around the picture, see `surrounded`.
        ready: the picture is the condition itself, such as drawn edges.

    Raises:
        ConfigError: the filter can't use them. UserError: a file is no picture.
    """
    name, inpaints = type(filter).__name__, isinstance(filter, InpaintFilter)
    if inpaints and not ready and (mask is None) == (margins is None):
        raise ConfigError(f"{name} paints where a mask says, or in margins around a picture: give one of the two")
    if not inpaints and (mask is not None or margins is not None):
        raise ConfigError(f"{name} takes neither a mask nor margins: they are for ControlNets that inpaint")
    try:
        if ready:
            return filter.ready(_image(path, size))
        if isinstance(filter, SRFilter):
            return filter.enlarged(_image(path, [max(1, round(side * filter.scale_factor)) for side in size]), size)
        if margins is not None:
            return filter.masked(*surrounded(path, size, margins))
        return filter(_image(path, size)) if mask is None else filter.masked(*_with_mask(path, mask, size))
    except BadPicture as error:
        raise ConfigError(f"{mask} is no mask for {path}: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def surrounded(path: Path, size: Size, margins: Margins) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, H, W) with margins, a drawing of `size` in all, and a mask (1, 1, H, W), true in the margins.

    margins: left, top, right and bottom, as shares of the picture's sides, or one number for all four.
    """
    left, top, right, bottom = four_margins(margins)
    height, width = size[0] / (1 + top + bottom), size[1] / (1 + left + right)
    above, before = round(height * top), round(width * left)
    inner = max(1, round(height)), max(1, round(width))
    around = (before, size[1] - inner[1] - before, above, size[0] - inner[0] - above)
    picture = _image(path, inner)
    return F.pad(picture, around, value=1.0), F.pad(torch.zeros_like(picture[:, :1]), around, value=1.0) > 0.5


def four_margins(margins: Margins) -> tuple[float, float, float, float]:
    """Those of the left, top, right and bottom.

    Raises:
        ConfigError: one is negative, or all are 0.
    """
    all_four = (margins,) * 4 if isinstance(margins, int | float) else tuple(margins)
    if min(all_four) < 0 or not any(all_four):
        raise ConfigError(
            f"margins {margins}: how much to paint around the picture, as shares of its sides: 0.25, or "
            "[left, top, right, bottom] like [0, 0, 0.5, 0]"
        )
    return all_four


def pasted(drawn: Tensor, inpainted: Tensor) -> Tensor:
    """A drawing (3, h, w) with the pixels of an inpainting's condition (4, H, W) outside its mask: (3, H, W).

    Inside the mask nothing changes; outside, a seam of H / 64 fades from the drawing to the picture.
    """
    picture, mask = inpainted[None, :3], inpainted[None, 3:]
    drawn = drawn[None]
    if drawn.shape[2:] != picture.shape[2:]:
        drawn = F.interpolate(drawn, picture.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    reach = max(1, round(min(picture.shape[2:]) / 128))
    wider = F.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach)
    weight = F.avg_pool2d(wider, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    return torch.lerp(picture, drawn, weight)[0]


def _image(path: Path, size: Sequence[int]) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return (_people(path, size) if path.suffix == ".json" else read_picture(path, tuple(size)))[None]


def _with_mask(path: Path, mask: Path, size: Size) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, H, W), and its mask (1, 1, H, W) with the same crop. Raises BadPicture for the mask."""
    height, width = size_of(path)
    pixels = decode_alike(read_bytes(mask), place((height, width), size))
    return _image(path, size), torch.from_numpy(pixels[None, None, :, :, 0] > 127)


def _people(path: Path, size: Size) -> Tensor:
    try:
        people = read_people(read_bytes(path), size)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} can't be read as poses: {error}") from error
    return torch.from_numpy(draw_people(people, size)).permute(2, 0, 1) / 255


@dataclass(frozen=True)
class Control:
    """The residuals of one ControlNet for one condition, and how they count.

    residuals: (B or 1, C, h, w) or None, as `ControlNet` returns them. strength: what they are multiplied by. start,
    end: the part of the sampling in which they count, from 0 (pure noise) to 1 (the finished picture).
    """

    residuals: Sequence[Tensor | None]
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(f"a control counts from start {self.start} to end {self.end}: 0 <= start < end <= 1")


class ControlledStageC(nn.Module):
    """Stage C under control, for `draw_latents`: each control adds its residuals while its part of the sampling lasts.

    It takes one condition more than Stage C, `control` (B,), how much all controls count for a sample: 1 with and
    without the prompt, as published. With 0 on the unconditional side, guidance leads towards the controls as well,
    which are then followed more closely.

    Args:
        diffusion, shift: those of the sampling, from which the noise at its parts follows.
    """

    def __init__(self, generator: StageC, controls: Sequence[Control], diffusion: GDF, shift: float = 1.0):
        super().__init__()
        self.generator, self.controls = generator, list(controls)
        self.windows = [
            # An end of the sampling is open: at its clamped ends the noise doesn't say which step it is.
            tuple(
                open_end if share in (0, 1) else _noise_condition(diffusion, 1 - share, shift)
                for share, open_end in ((control.start, float("inf")), (control.end, -float("inf")))
            )
            for control in controls
        ]

    def forward(self, x: Tensor, r: Tensor, control: Tensor, **conditions: Tensor | None) -> Tensor:
        """What Stage C predicts of x (B, C, h, w) at noise conditions r (B,): like x; `conditions` are Stage C's."""
        return self.generator(x, r, cnet=self._residuals(r, control), **conditions)

    def _residuals(self, r: Tensor, control: Tensor) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * max((len(one.residuals) for one in self.controls), default=0)
        for one, (highest, lowest) in zip(self.controls, self.windows, strict=True):
            # Steps lie further apart than this tolerance. At its end a control counts no more.
            lasts = (r <= highest + 1e-4) & (r > lowest + 1e-4)
            weight = (one.strength * control * lasts)[:, None, None, None]
            for i, residual in enumerate(one.residuals):
                if residual is not None:
                    repeats = len(r) // len(residual)  # guidance asks with and without the prompt at once
                    total[i] = _sum(total[i], residual.repeat(repeats, 1, 1, 1) * weight.to(residual.dtype))
        return total


def _noise_condition(diffusion: GDF, t: float, shift: float) -> float:
    return diffusion.noise_cond(diffusion.schedule(torch.tensor([t]), shift=shift)).item()


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    """The sum of residuals (B, C, h, w); of other positions, the second gets those of the first."""
    if one is None:
        return other
    return one + resize(other.permute(0, 2, 3, 1), one.shape[2:]).permute(0, 3, 1, 2)
