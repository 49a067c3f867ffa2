"""Pictures for prompts: the keys that every family takes, and what it gives `inference/text_to_image.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor

from families.common.inference import ComputeSettings, RunSettings
from families.common.prompt_flags import Prompt, without_flags
from warpcore.config import ConfigError
from warpcore.config_keys import SidePx, Steps
from warpcore.data.buckets import parse_ratio
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.files import why_no_file
from warpcore.text import read_text, shortened


class TextToImageConfig(RunSettings, ComputeSettings):
    """What is drawn, how, and where it is written."""

    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures, each of which holds its prompt and settings; by default the first
    of `pictures`, `pictures_2`, ... that is free."""
    overwrite: bool = False
    """Write over pictures of the same names in `output_path`."""
    prompts: list[Prompt] = []
    """What to draw."""
    prompt_file: Path | None = None
    """A text file with a prompt per line, drawn after `prompts`."""
    negative_prompt: Prompt = ""
    """What guidance leads away from."""
    seeds: list[int] = Field([0], min_length=1)
    """Each prompt is drawn once for each of these; a seed gives the same noise whatever else is drawn."""
    image_size: SidePx = 1024
    """Side of a square picture in pixels; other shapes get about the same area."""
    aspect_ratio: PositiveFloat | None = None
    """Width divided by height: 1.5, 3/2 or 16:9; by default that of a picture that is given, else 1."""
    size: tuple[SidePx, SidePx] | None = None
    """[height, width] in pixels, instead of the two keys above."""
    steps: Steps = 20
    """Sampling steps."""
    guidance: float | None = 4.0
    """Classifier-free guidance: 1 follows the prompt as trained, more follows it harder; null computes none."""
    sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """`ddim` draws without further noise; `dpmpp_2m` needs the fewest steps."""
    shift: PositiveFloat = 1.0
    """Moves the noise schedule towards more noise (> 1) for larger pictures."""

    prompt_keys: ClassVar[str] = "prompts or prompt_file"
    """The keys that say what to draw, for the error message where none is given."""

    @field_validator("aspect_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float | None:
        return None if value is None else parse_ratio(value, "aspect_ratio")

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if not self.prompts and self.prompt_file is None and not self.draws_without_prompt:
            raise ValueError(f"nothing to draw: give {self.prompt_keys}")
        return self

    @property
    def draws_without_prompt(self) -> bool:
        """Whether something else than a prompt says what to draw, such as a picture to vary."""
        return False

    @property
    def default_aspect_ratio(self) -> float:
        """Width divided by height where no key says it."""
        return 1.0

    @property
    def all_prompts(self) -> list[str]:
        """The prompts of the config and of its file; one empty prompt where there is none."""
        return [*self.prompts, *_lines(self.prompt_file)] or [""]

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        if self.size:
            return self.size
        ratio = self.aspect_ratio or self.default_aspect_ratio
        side = self.image_size / ratio**0.5
        return round(side), round(side * ratio)


class Drawn(NamedTuple):
    """Pictures (3, H, W) in [0, 1], one for each prompt; and further ones to keep, such as what a ControlNet saw."""

    pictures: list[Tensor]
    conditions: Sequence[Tensor] = ()


class TextToImage(Protocol):
    """What a family gives `inference/text_to_image.py`: a class, made of its config."""

    Config: type[TextToImageConfig]
    num_conditions: int
    """How many further pictures `draw` gives, known before it is called."""

    def __init__(self, config: TextToImageConfig): ...

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed."""

    def notes(self) -> list[str]:
        """Lines to print after the drawing: what was left out and why, the memory that it took."""


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if problem := why_no_file(path):
        raise ConfigError(f"prompt_file: {path} {problem}")
    lines = [line.strip() for line in read_text(path).splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"prompt_file: {path} holds no prompt; write one per line")
    for prompt in prompts:
        try:
            without_flags(prompt)
        except ValueError as error:
            raise ConfigError(f"prompt_file: {path}, {shortened(prompt)!r}: {error}") from None
    return prompts
