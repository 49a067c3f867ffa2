"""What records of another program become: `tools/build_dataset.py --records` asks the family of a training for it."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ImportedRecord:
    """A sample of another program's cache."""

    features: dict[str, Tensor] = field(default_factory=dict)
    """Without a batch dimension, by the names that trainings of the family have."""
    members: dict[str, bytes] = field(default_factory=dict)
    """What else a tar has of it: `txt`, its caption, `json`, its fields, `cls`, its class."""
    fps: float = 0.0
    """Frames per second of a clip, as it was cached; 0 of a picture."""
    not_taken: list[str] = field(default_factory=list)
    """What of it nothing here reads."""
    problem: str = ""
    """Why it can't be used."""
