"""Captions that are lists of tags: their order changes from draw to draw, and some are left out."""

from collections.abc import Sequence
from typing import Self

from pydantic import Field, NonNegativeInt, model_validator

from warpcore.config import Settings, ShareBelowOne
from warpcore.idle_keys import Need
from warpcore.random import stable_hash


class TagSettings(Settings):
    """Keys on captions that are lists of tags."""

    needs = {"tag_separator": Need("shuffle_tags or tag_dropout", lambda config: config.tags_vary)}

    shuffle_tags: bool = False
    """Captions are lists of tags, whose order means nothing: each draw of a sample has another one."""
    tag_dropout: ShareBelowOne = 0.0
    """Share of the tags that is left out, others in each draw; 0.05 to 0.1 are usual."""
    keep_tags: NonNegativeInt = 0
    """The first tags of a caption that stay where they are and are never left out: the subject, a trigger word."""
    tag_separator: str = Field(",", min_length=1)
    """What is between two tags."""

    @property
    def tags_vary(self) -> bool:
        """Whether a sample's caption differs from draw to draw."""
        return self.shuffle_tags or self.tag_dropout > 0

    @model_validator(mode="after")
    def _kept_from_something(self) -> Self:
        without_use = "keep_tags" in getattr(self, "unused", ())  # which is refused by itself
        if self.keep_tags and not self.tags_vary and not without_use:
            raise ValueError("keep_tags has no effect without shuffle_tags or tag_dropout: write one of them")
        return self


def drawn_tags(captions: Sequence[str], seeds: Sequence[int], settings: TagSettings) -> list[str]:
    """The captions with their tags in an order, and without those left out, that follow from each sample's seed."""
    if not settings.tags_vary:
        return list(captions)
    return [_drawn(caption, seed, settings) for caption, seed in zip(captions, seeds, strict=True)]


def _drawn(caption: str, seed: int, settings: TagSettings) -> str:
    tags = [tag for part in caption.split(settings.tag_separator) if (tag := part.strip())]
    first, places = tags[: settings.keep_tags], range(settings.keep_tags, len(tags))
    if settings.tag_dropout:
        places = [i for i in places if stable_hash(seed, "tag dropout", i) / 2**63 >= settings.tag_dropout]
    if settings.shuffle_tags:
        places = sorted(places, key=lambda i: stable_hash(seed, "tag order", i))
    return f"{settings.tag_separator.rstrip()} ".join([*first, *(tags[i] for i in places)])
