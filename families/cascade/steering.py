"""What steers Stage C beside the prompts: LoRAs and ControlNets, as a config or a command line names them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import NonNegativeInt, field_validator, model_validator
from torch import Tensor

from families.cascade import build
from families.cascade.controlled import Control, condition_of_file, four_margins
from families.cascade.controlnet import load_controlnet
from families.cascade.inference import DrawingSettings, warn_of_contradictions
from families.cascade.sampling import Cascade
from families.common.pictures import size_of
from families.common.weight_source import listed_weights
from modules.filters.inpaint import InpaintFilter
from warpcore.config import ConfigError, FileName, Share
from warpcore.files import why_no_file
from warpcore.idle_keys import Need

OF_EACH = ("control_image", "control_ready", "control_strength", "control_start", "control_end")
"""Keys that hold a value for each ControlNet, or one for all."""
OF_A_FILE = ("controlnet_filter", "controlnet_filter_params", "controlnet_blocks")
"""Keys of a ControlNet's training that count instead of what its file says."""


class SteeringSettings(DrawingSettings):
    """Keys of scripts that draw with Stage C."""

    needs = {
        "keep_unmasked": Need(
            "control_mask or control_margins",
            lambda config: config.control_mask is not None or config.control_margins is not None,
        ),
    }

    lora: list[FileName] = []
    """LoRAs, whose changes add up: WEIGHTS or WEIGHTS:STRENGTH each, files in any format, folders of runs that made
    one, or names of the Hugging Face hub; embeddings of tokens too."""
    controlnet: list[Path] = []
    """ControlNets that all count: files, folders of runs that made one, or names of the Hugging Face hub."""
    control_image: list[Path] = []
    """The picture of which a ControlNet's filter makes the condition; for poses also key points (.json)."""
    control_ready: list[bool] = [False]
    """Whether that picture is the condition itself, such as drawn edges."""
    control_strength: list[float] = [1.0]
    """How much a ControlNet counts; 0 is none."""
    control_start: list[Share] = [0.0]
    """The part of the sampling from which on a ControlNet counts: 0 is pure noise, 1 the finished picture."""
    control_end: list[Share] = [1.0]
    """The part of the sampling up to which a ControlNet counts."""
    control_guided: bool = False
    """Let guidance lead towards the conditions as well, not only the prompt: they are followed more closely."""
    control_mask: Path | None = None
    """For ControlNets that inpaint: a picture, of the shape of theirs, that is white where to paint."""
    control_margins: float | tuple[float, float, float, float] | None = None
    """Instead of a mask: how much to paint around the picture, as shares of its sides: 0.25, or [left, top, right,
    bottom]."""
    keep_unmasked: bool = True
    """After inpainting, take what is outside the mask from the picture itself."""
    controlnet_filter: str | None = None
    """The filter of a ControlNet whose file does not say it, as in its training config."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of the filter, instead of those of the training."""
    controlnet_blocks: list[NonNegativeInt] | None = None
    """The controlled blocks of a ControlNet whose file does not say them."""

    @field_validator("lora", "controlnet", *OF_EACH, mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> list:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _a_value_for_each_controlnet(self) -> Self:
        count = len(self.controlnet)
        if not count:
            given = [key for key in (*OF_EACH, *OF_A_FILE, "control_mask", "control_margins", "control_guided")
                     if getattr(self, key) != type(self).model_fields[key].default]  # fmt: skip
            if given:
                raise ValueError(f"{given[0]} is for a ControlNet: give controlnet too")
            return self
        for key in OF_EACH:
            if len(getattr(self, key)) not in (1, count):
                raise ValueError(f"{key} has {len(getattr(self, key))} values and controlnet {count}: write one for "
                                 "each ControlNet, or one for all")  # fmt: skip
        for start, end in zip(self.each("control_start"), self.each("control_end"), strict=True):
            if start >= end:
                raise ValueError(f"control_start {start} is not before control_end {end}: the ControlNet never counts")
        for key, paths in (("control_image", self.control_image), ("control_mask", [self.control_mask])):
            for path in paths:
                if path is not None and (problem := why_no_file(path)):
                    raise ValueError(f"{key}: {path} {problem}")
        if count > 1 and self.said_of_file:
            raise ValueError(f"{next(iter(self.said_of_file))} is for one ControlNet: of several, their files have to "
                             "say it (tools/export.py controlnet)")  # fmt: skip
        if self.control_mask is not None and self.control_margins is not None:
            raise ValueError("control_mask and control_margins both say where to paint: give one of the two")
        if self.control_margins is not None:
            four_margins(self.control_margins)
        return self

    def each(self, key: str) -> list:
        """A value for each ControlNet."""
        values = getattr(self, key)
        return values if len(values) == len(self.controlnet) else values * len(self.controlnet)

    @property
    def said_of_file(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in OF_A_FILE if getattr(self, key) is not None}

    @property
    def control_shape(self) -> tuple[float, float] | None:
        """(H, W), up to a factor, of the picture of the first ControlNet, margins included; poses have none."""
        if not self.control_image or self.control_image[0].suffix == ".json":
            return None
        height, width = size_of(self.control_image[0])
        left, top, right, bottom = four_margins(self.control_margins) if self.control_margins else (0,) * 4
        return height * (1 + top + bottom), width * (1 + left + right)


class Steered(NamedTuple):
    """A ControlNet's residuals, its condition (3, H, W) as a picture to look at, and if it inpaints as (4, H, W)."""

    control: Control
    picture: Tensor
    inpainted: Tensor | None


def open_controls(cascade: Cascade, settings: SteeringSettings, size: tuple[int, int]) -> list[Steered]:
    """Let each ControlNet of the settings look at its picture, for drawings of `size` (H, W).

    Raises:
        UserError: a file is missing or of something else, or a filter cannot use its picture.
    """
    steered = []
    for path, image, ready, strength, start, end in zip(
        settings.controlnet, *map(settings.each, OF_EACH), strict=True
    ):
        file = listed_weights(path, "controlnet", settings.use_ema)
        warn_of_contradictions(file, settings)
        network, filter = load_controlnet(file, settings, settings.said_of_file)
        inpaints = isinstance(filter, InpaintFilter)
        where = {"mask": settings.control_mask, "margins": settings.control_margins} if inpaints else {}
        with ExitStack() as stack:
            encoder = stack.enter_context(cascade.holding("encoder", build.encoder)) if filter.needs_encoder else None
            made = condition_of_file(filter.to(cascade.device, encoder), image, size, ready=ready, **where)
        with cascade.holding("ControlNet", lambda _, network=network: network) as network:
            residuals = network(made.condition.to(cascade.device, cascade.dtype))
        condition = made.condition[0].float().cpu()
        steered.append(Steered(Control(residuals, strength, start, end), made.picture[0].float().cpu(),
                               condition if inpaints else None))  # fmt: skip
    if not any(one.inpainted is not None for one in steered) and (settings.control_mask or settings.control_margins):
        raise ConfigError("control_mask and control_margins are for ControlNets that inpaint; there is none here")
    return steered
