"""Pictures of a mini DiT to be scored: drawn for names of classes, and rebuilt from given ones."""

from collections.abc import Sequence

from torch import Tensor

from families.common.scoring import SIDE_PX, ScoredLatents, ScoredSettings, Ways, as_uint8, class_numbers
from families.dit.drawing import DitNetworks
from families.dit.inference import DitInferenceSettings


class ScoredDitSettings(ScoredSettings, DitInferenceSettings):
    """A DiT, of a run."""


class ScoredDit(ScoredLatents):
    """The ways through a DiT; see `families.common.scoring.Scored`."""

    Config = ScoredDitSettings
    pipeline = DitNetworks
    scripts = "train_dit"
    draws_classes = True

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        return {self.best: as_uint8(self.networks.decode(self.latents(prompts, (SIDE_PX, SIDE_PX), seed)))}

    def latents(self, prompts: Sequence[str], size: Sequence[int], seed: int) -> list[Tensor]:
        """Latents of names of classes, for pictures of (H, W) px or clips of (T, H, W)."""
        example = f"quick{self.scripts.replace('train', 'start')}.yaml"
        labels = class_numbers(prompts, self.settings.class_names, example)
        seeds = [seed + i for i in range(len(prompts))]
        return self.networks.draw(labels, size, seeds, **self.sampling)
