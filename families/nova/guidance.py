"""Guidance of NOVA's diffusion head: several passes of one batch, and what is made of their predictions."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGuidance:
    """Classifier-free guidance (arXiv:2207.12598) of tokens that are drawn in groups.

    A batch is passed with its condition, then without; with image guidance a third time, without the condition, while
    the second pass then sees no earlier frame and no places. The reference's spatiotemporal guidance is not here: its
    third pass is the first one again in these networks, and its term is 0.
    """

    scale: float = 5.0
    """1 is no guidance."""
    least: float | None = None
    """The scale grows from group to group, from about this one to `scale`."""
    until: float = 0.0
    """Below this time of diffusion (0 to 1,000) the condition alone is followed."""
    renorm: float = 1.0
    """The least factor by which a prediction is made as long as that of the condition where it is longer; 1 leaves it
    alone. Norms are over all tokens of a frame."""
    image_scale: float | None = None
    """How much more is drawn what follows from earlier frames, whatever the condition."""

    @property
    def passes(self) -> int:
        if self.scale <= 1:
            return 1
        return 2 if self.image_scale is None else 3

    def conditions(self, condition: Tensor, unconditional: Tensor | None) -> Tensor:
        """Tokens (passes B, L, D) of each pass, from those of B samples with and without condition.

        Raises ValueError where `unconditional` is missing.
        """
        if self.passes == 1:
            return condition
        if unconditional is None:
            raise ValueError(f"guidance of scale {self.scale} needs what stands for no condition")
        return torch.cat([condition, *[unconditional] * (self.passes - 1)])

    def unseen(self, samples: int, device: torch.device) -> Tensor | None:
        """(passes B,) bool: rows that do not see the frame before; None where all do."""
        if self.passes < 3:
            return None
        rows = torch.zeros(self.passes, samples, dtype=torch.bool, device=device)
        rows[1] = True
        return rows.flatten()

    def scale_of(self, group: int, groups: int) -> float:
        """Of a group of tokens, from 0."""
        if self.least is None:
            return self.scale
        return self.least + (self.scale - self.least) * (group + 1) / groups

    def combined(self, predictions: Tensor, scale: float) -> Tensor:
        """The guided prediction (B, ...) of those of all passes (passes B, ...)."""
        if self.passes == 1:
            return predictions
        condition, none, *third = predictions.chunk(self.passes)
        compared = third[0] if third else none
        guided = self._renormed(none + (condition - compared) * scale, condition)
        return guided + (third[0] - none) * self.image_scale if third else guided

    def _renormed(self, guided: Tensor, condition: Tensor) -> Tensor:
        if self.renorm >= 1:
            return guided
        wanted, found = (
            one.flatten(1).norm(dim=1).view(-1, *[1] * (one.dim() - 1)) for one in (condition, guided)
        )  # fmt: skip
        return guided * (wanted / found).clamp(self.renorm, 1)
