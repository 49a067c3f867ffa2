"""Configuration keys of networks that draw classes, and of trainings whose samples have classes."""

from collections import Counter
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from families.common.classes import class_number
from warpcore.config import Settings, Share

CAPTION_KEYS = frozenset({
    "captions_getter", "caption_templates", "caption_dropout", "cache_text", "shuffle_tags", "tag_dropout",
    "cache_text_gb", "keep_tags", "tag_separator",
})  # fmt: skip
"""Keys of other scripts, for which a network without texts has no use."""
MAX_CLASSES = 1_000_000
ClassCount = Annotated[int, Field(gt=0, le=MAX_CLASSES)]


class NamedClasses(Settings):
    """Which classes a network draws."""

    num_classes: ClassCount | None = None
    """Classes are numbers from 0, and below this; null: the network is told something else than classes."""
    class_names: list[str] = []
    """The name of each class, in order, where samples and drawings call classes by name; says `num_classes` too."""

    @model_validator(mode="before")
    @classmethod
    def _names_are_counted(cls, values: dict[str, Any]) -> dict[str, Any]:
        names = values.get("class_names")
        if isinstance(names, list) and names and values.get("num_classes") is None:
            values = values | {"num_classes": len(names)}
        return values

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> Self:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names: {len(self.class_names)} names for {self.num_classes} classes (num_classes); leave "
                "num_classes out, or name every class"
            )
        if len(set(self.class_names)) < len(self.class_names):
            twice = Counter(self.class_names).most_common(1)[0][0]
            raise ValueError(f"class_names: {twice!r} names two classes")
        return self


class ClassSettings(NamedClasses):
    """Which classes samples have, and which are drawn on the way."""

    class_getter: tuple[str, str] = ("cls", "identity")
    """Member and expression that give the class of a sample, its number or one of `class_names`: `['json', 'lambda j:
    j["label"]']`. `key` stands for the sample's key: `['key', 'lambda k: k.split("/")[0]']`."""
    class_dropout: Share = 0.1
    """Share of the samples whose class is replaced by the empty one, for guidance."""
    sample_classes: list[int | str] = []
    """Classes to draw at every save, as numbers or by name; without them those of held-out samples, or else of a few
    training samples, are taken."""

    @model_validator(mode="after")
    def _classes_are_known(self) -> Self:
        try:
            _ = self.sample_numbers
        except ValueError as error:
            raise ValueError(f"sample_classes: {error}") from None
        return self

    @property
    def sample_numbers(self) -> list[int]:
        """The numbers of `sample_classes`."""
        if self.num_classes is None:
            return []
        return [class_number(one, self.num_classes, self.class_names) for one in self.sample_classes]
