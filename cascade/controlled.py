"""Drawing under the control of ControlNets: conditions from files, and Stage C with the residuals made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.pictures import read_picture
from cascade.poses import read_people
from modules.blocks import resize
from modules.filters import Filter, Filtered
from modules.filters.inpaint import InpaintFilter
from modules.filters.pose import draw_people
from modules.stage_c import StageC
from warpcore.config import ConfigError
from warpcore.diffusion.diffusion import GDF

Size = tuple[int, int]


def condition_of_file(
    filter: Filter,
    path: Path,
    size: Size,
    *,
    mask: Path | None = None,
    outpaint: float | None = None,
    ready: bool = False,
) -> Filtered:
    """The condition, of a batch of one, that a filter makes of a picture for a drawing of `size` (H, W).

    Args:
        path: the picture, scaled to cover `size` and cropped; for poses, key points (.json) or a drawn skeleton.
        mask: for inpainting, a picture that is light where to paint.
        outpaint: for inpainting, the sides of the drawing, divided by those of the picture in its middle.
        ready: the picture is the condition itself, such as drawn edges.

    Raises:
        ConfigError: the filter can't use them. UserError: a file is no picture.
    """
    name, inpaints = type(filter).__name__, isinstance(filter, InpaintFilter)
    if inpaints and not ready and (mask is None) == (outpaint is None):
        raise ConfigError(f"{name} paints where a mask says, or around a picture (outpaint): give one of the two")
    if not inpaints and (mask is not None or outpaint is not None):
        raise ConfigError(f"{name} takes neither a mask nor outpaint: they are for ControlNets that inpaint")
    if outpaint is not None:
        images, masks = surrounded(path, size, outpaint)
    else:
        images = (_people(path, size) if path.suffix == ".json" else read_picture(path, size))[None]
        masks = None if mask is None else read_picture(mask, size)[None, :1] > 0.5
    try:
        if ready:
            return filter.ready(images)
        return filter(images) if masks is None else filter.masked(images, masks)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def surrounded(path: Path, size: Size, factor: float) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, H, W) in the middle of a drawing of `size` whose sides are `factor` times longer, and a mask
    (1, 1, H, W), true around it."""
    if factor <= 1:
        raise ConfigError(
            f"outpaint {factor}: a drawing is larger than the picture in it; write more than 1, like 1.5"
        )
    inner = tuple(max(1, round(side / factor)) for side in size)
    above, left = ((side - part) // 2 for side, part in zip(size, inner, strict=True))
    margins = (left, size[1] - inner[1] - left, above, size[0] - inner[0] - above)
    picture = read_picture(path, inner)[None]
    return F.pad(picture, margins, value=1.0), F.pad(torch.zeros_like(picture[:, :1]), margins, value=1.0) > 0.5


def _people(path: Path, size: Size) -> Tensor:
    try:
        people = read_people(path.read_bytes(), size)
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
