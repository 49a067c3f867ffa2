"""What the hooks of a use case return: losses, and pictures to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Losses:
    """What a use case's `loss` returns.

    loss: (B,) per sample, minimised. raw: (B,) before weighting. statistics: per-sample tensors (B, ...) that
    `update_state` gets. metrics: further numbers per sample (B,) to report, in training and in validation.
    """

    loss: Tensor
    raw: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def means(self, weight: float) -> dict[str, Tensor]:
        """Means over the samples, times `weight`, of all to report: both losses and the metrics."""
        values = {"loss": self.loss, "raw_loss": self.raw, **self.metrics}
        return {name: value.detach().float().mean() * weight for name, value in values.items()}


@dataclass
class Sampled:
    """One row of the sample grid: a caption, and pictures (uint8 H W 3) or clips (uint8 T H W 3) by column."""

    caption: str
    pictures: dict[str, np.ndarray]
    fps: float = 8.0
    """Frames per second of its clips."""

    @classmethod
    def rows(
        cls, captions: Sequence[str], columns: Mapping[str, Sequence[np.ndarray]], fps: float = 8.0
    ) -> list["Sampled"]:
        """A row for each caption, from columns of as many pictures or clips, or more."""
        return [
            cls(caption, {name: pictures[i] for name, pictures in columns.items()}, fps)
            for i, caption in enumerate(captions)
        ]


def per_sample(values: Tensor) -> Tensor:
    """The means (B,) of (B, ...)."""
    return values.flatten(1).mean(dim=1)
