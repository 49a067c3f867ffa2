"""Pictures or clips of classes: the keys that every family takes, and what it gives `inference/class_to_image.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from pydantic import model_validator

from families.common.classes import class_number
from families.common.drawn_pictures import DrawingConfig, Drawn, read_lines
from warpcore.errors import UserError


class ClassToImageConfig(DrawingConfig):
    """Which classes are drawn, how, and where the pictures are written. A family adds those that its networks have:
    `families.common.class_keys.NamedClasses`."""

    classes: list[int | str] = []
    """What to draw: numbers, or names where the network's classes have some."""
    class_file: Path | None = None
    """A text file with a class per line, drawn after `classes`."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if not self.classes and self.class_file is None:
            raise ValueError("nothing to draw: give classes or class_file")
        return self

    @property
    def all_classes(self) -> list[int | str]:
        """The classes of the config and of its file."""
        listed = [] if self.class_file is None else read_lines(self.class_file, "class_file", "class")
        return [*self.classes, *listed]

    @property
    def labels(self) -> list[int]:
        """Their numbers.

        Raises:
            UserError: the network has no such class.
        """
        try:
            return [class_number(one, self.num_classes, self.class_names) for one in self.all_classes]
        except ValueError as error:
            raise UserError(f"classes, class_file: {error}") from None


class ClassToImage(Protocol):
    """What a family gives `inference/class_to_image.py`: a class, made of its config."""

    Config: type[ClassToImageConfig]
    labels: Sequence[int]
    """The number of each of the config's classes."""
    titles: Sequence[str]
    """What each of them is called."""

    def __init__(self, config: ClassToImageConfig): ...

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> Drawn:
        """A picture or a clip for each class and its seed."""

    def notes(self) -> list[str]:
        """Lines to print after the drawing: the memory that it took."""
