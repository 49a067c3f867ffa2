"""What inference scripts take of runs and files of NOVA: which networks, what these say of themselves, how to draw."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from families.common import inference_sources
from families.common.classes import NAMES_KEY, names_said
from families.common.drawn_pictures import GUIDED, DrawingConfig
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import GENERATOR, RUN_CONFIG, TARGET_KEY, metadata_of, target_of
from families.nova import build
from families.nova.config import NovaSettings
from families.nova.files import config_said
from families.nova.generation import Drawing
from families.nova.guidance import TokenGuidance
from families.nova.schedulers import scheduler_said
from families.nova.versions import FLOW, classes_of, version_of
from warpcore.config import Share
from warpcore.config_files import read_mapping
from warpcore.config_keys import SidePx, Steps
from warpcore.errors import UserError
from warpcore.idle_keys import Need

logger = logging.getLogger(__name__)

OF_RUNS = {"generator": GENERATOR}
"""What runs export, and the key that takes each."""
STEPS = {True: 25, False: 100}
"""Of the diffusion of a token, of a flow and without."""
MOTION = 5.0
"""The score that published networks of clips are told."""


class NovaInferenceSettings(RunSettings, NovaSettings):
    """The networks of NOVA, published or out of training runs."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from the transformer's files."""
        merged = with_runs(cls, values, cls.settings_of_run)
        if not isinstance(path := merged.get(GENERATOR), Path) or not path.exists():
            return merged
        config = config_said(path, GENERATOR) or {}
        said = {"model_version": version_of(config), TARGET_KEY: target_of(path) if path.is_file() else None}
        said |= {key: config.get(key) for key in ("video_mixer_rank", "rotary_pos_embed")} | scheduler_said(path)
        said["num_classes"] = classes_of(config) if config else None
        said[NAMES_KEY] = names_said(metadata_of(path), f"the class names of {path}") or None
        known = {key: value for key, value in said.items() if value is not None}
        return known | {key: value for key, value in merged.items() if value is not None or key not in known}

    @classmethod
    def settings_of_run(cls, folder: Path, use_ema: bool = True) -> dict[str, Any]:
        """See `families.common.inference_sources.settings_of_run`."""
        return inference_sources.settings_of_run(folder, NovaSettings, OF_RUNS, use_ema=use_ema)

    @property
    def of_run(self) -> Mapping[str, Any]:
        """All keys of the last run."""
        return read_mapping(self.run[-1] / RUN_CONFIG) if self.run else {}

    @property
    def trained_px(self) -> tuple[int, int]:
        """(H, W) of the pictures, or frames, that the network has places for."""
        config = config_said(self.generator_checkpoint_path, GENERATOR) or {}
        if "image_base_size" not in config:
            return self.version.size_px
        rows, columns = (tokens * build.token_px(self) for tokens in config["image_base_size"])
        return rows, columns

    @property
    def told_motion(self) -> float | None:
        """The motion score that the network is told; None where it is told none."""
        saved = self.of_run
        if saved:
            return saved["sample_flow"] if saved.get("motion_column") else None
        return MOTION if self.version.draws_clips else None


class NovaDrawingConfig(NovaInferenceSettings, DrawingConfig):
    """How pictures and clips are drawn."""

    unused = frozenset({"sampler"})
    needs: ClassVar[Mapping[str, Need]] = {
        **dict.fromkeys(("min_guidance", "guidance_trunc", "guidance_renorm", "image_guidance"), GUIDED),
        "flow_shift": Need(f"diffusion_target: {FLOW}", lambda config: config.target == FLOW),
    }

    draws_classes: ClassVar[bool] = False
    """Whether it is told classes, and not texts."""

    image_size: SidePx | None = None
    """Side of a square picture in pixels; other shapes get about the same area. By default the size of the training,
    the only one for which networks without rotary positions learned places."""
    groups: Steps = 64
    """Autoregressive steps: groups in which the tokens of a frame are drawn, each after the one before."""
    steps: Steps | None = None
    """Diffusion steps of each group; by default 25 of a flow, else 100."""
    guidance: NonNegativeFloat | None = 5.0
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder."""
    min_guidance: NonNegativeFloat | None = None
    """Let the guidance grow from group to group, from this to `guidance`."""
    guidance_trunc: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Below this time of the diffusion, which goes from 1,000 to 0, the prompt alone is followed."""
    guidance_renorm: Share = 1.0
    """The least factor by which guided predictions are made as long as those of the prompt; 1 leaves them alone."""
    image_guidance: NonNegativeFloat | None = None
    """How much more is drawn what follows from earlier frames, whatever the prompt: a third pass."""
    flow_shift: PositiveFloat | None = None
    """Replaces `shift` where the times of the steps are shifted; their ends keep it."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the transformer: give run or generator_checkpoint_path")
        if (self.num_classes is not None) != self.draws_classes:
            told, script = ("texts", "text_to_image") if self.num_classes is None else ("classes", "class_to_image")
            raise ValueError(f"this network is told {told}: draw with inference/{script}.py")
        if getattr(self, "negative_prompt", "") and not self.is_guided:
            raise ValueError("negative_prompt: without guidance it has no effect")
        return self

    @property
    def is_guided(self) -> bool:
        return self.guidance is not None and self.guidance > 1

    @property
    def drawing(self) -> Drawing:
        """How each frame is drawn."""
        guidance = TokenGuidance(
            self.guidance if self.is_guided else 1.0,
            self.min_guidance,
            self.guidance_trunc,
            self.guidance_renorm,
            self.image_guidance,
        )
        return Drawing(self.groups, self.steps or STEPS[self.target == FLOW], guidance, self.flow_shift)

    def check_size(self, size_px: tuple[int, int]) -> None:
        """Raise UserError for (H, W) that the network can't draw; those that it never learned places of are told."""
        factor = 2 * build.token_px(self)
        if any(side % factor or not side for side in size_px):
            height, width = size_px
            raise UserError(f"size: {height} x {width} px (height x width); sides are multiples of {factor} px")
        if not self.rotary_pos_embed and size_px != self.trained_px:
            height, width = self.trained_px
            logger.warning(
                "size: this network has no rotary positions, and learned places of %d x %d px (height x width) alone: "
                "expect less of %d x %d px", height, width, *size_px,
            )  # fmt: skip


class NovaPictureConfig(NovaDrawingConfig):
    """How pictures are drawn."""

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures: what `size` says, else sides that the network can draw, of about the area."""
        if self.size:
            return self.size
        height, width = self.trained_px
        if self.image_size is None and self.aspect_ratio is None:
            return height, width
        factor, side = 2 * build.token_px(self), self.image_size or (height * width) ** 0.5
        ratio = self.aspect_ratio or self.default_aspect_ratio
        height, width = (max(round(one / factor), 1) * factor for one in (side / ratio**0.5, side * ratio**0.5))
        return height, width
