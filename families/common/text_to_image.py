"""Pictures for prompts: the keys that every family takes, and what it gives `inference/text_to_image.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self

from pydantic import model_validator

from families.common.drawn_pictures import GUIDED, DrawingConfig, Drawn, read_lines
from families.common.prompt_flags import Prompt, without_flags
from warpcore.config import ConfigError
from warpcore.text import shortened


class TextToImageConfig(DrawingConfig):
    """Which prompts are drawn, how, and where the pictures are written."""

    needs = {"negative_prompt": GUIDED}

    prompts: list[Prompt] = []
    """What to draw."""
    prompt_file: Path | None = None
    """A text file with a prompt per line, drawn after `prompts`."""
    negative_prompt: Prompt = ""
    """What guidance leads away from."""

    prompt_keys: ClassVar[str] = "prompts or prompt_file"
    """The keys that say what to draw, for the error message where none is given."""

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
    def all_prompts(self) -> list[str]:
        """The prompts of the config and of its file; one empty prompt where there is none."""
        return [*self.prompts, *_lines(self.prompt_file)] or [""]


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
    prompts = [] if path is None else read_lines(path, "prompt_file", "prompt")
    for prompt in prompts:
        try:
            without_flags(prompt)
        except ValueError as error:
            raise ConfigError(f"prompt_file: {path}, {shortened(prompt)!r}: {error}") from None
    return prompts
