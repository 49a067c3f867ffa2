"""Pictures of a mini DiT to be scored: drawn for names of classes, and rebuilt from given ones."""

from collections.abc import Sequence

from torch import Tensor

from families.common.scoring import SIDE_PX, ScoredLatents, ScoredSettings, Ways, as_uint8
from families.dit.drawing import DitNetworks
from families.dit.inference import DitInferenceSettings
from warpcore.errors import UserError


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
        names = self.settings.class_names
        if missing := [name for name in prompts if name not in names]:
            example = f"quick{self.scripts.replace('train', 'start')}.yaml"
            raise UserError(f"--run: it has no class {missing[0]!r} (class_names), as {example} names them")
        seeds = [seed + i for i in range(len(prompts))]
        return self.networks.draw([names.index(name) for name in prompts], size, seeds, **self.sampling)
