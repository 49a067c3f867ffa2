"""What a use case needs of every sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from warpcore.data.fields import Field, PictureField
from warpcore.data.joined import FurtherTars
from warpcore.errors import UserError


@dataclass(frozen=True)
class DataNeeds:
    """What is read of every sample, and how pictures come."""

    bucket_factor: int = 1
    """Sides of pictures are multiples of it, in pixels."""
    images: bool = True
    """Whether pictures are read at all."""
    videos: bool = False
    """Whether videos are taken, as clips of frames. Otherwise their rows are left out, and counted."""
    captions: bool = True
    """Whether every sample needs a caption."""
    geometry: bool = False
    """Whether `Batch.geometry` is wanted."""
    extra: Mapping[str, Field] = field(default_factory=dict)
    """Further members of each sample to read, for `Batch.extra`."""
    computed: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions of a batch, for the workers to call."""
    columns: Sequence[str] = ()
    """Index columns for `Batch.columns`."""
    further: Mapping[str, Sequence[FurtherTars]] = field(default_factory=dict)
    """By `webdataset_path` and `validation_path`, tars with further members of the samples that they name."""
    validation_by_key: bool = False
    """Whether the seeds of validation samples follow from their keys alone, so that they are the same in every run."""
    geometry_remedy: str = ""
    """What a user does where features, stored in place of pictures, lack their geometry."""

    def __post_init__(self):
        """Raises UserError for a picture beside clips, such as a mask: it would belong to one of their frames."""
        for one in self.extra.values() if self.videos else ():
            if isinstance(one, PictureField):
                _, option = getattr(one, "optional", (None, None))
                raise UserError(
                    f"a .{one.suffixes[0]} belongs to one picture, and this script trains on clips: "
                    f"{f'remove {option}' if option else 'do without it'}, or train on pictures with a script of them"
                )
