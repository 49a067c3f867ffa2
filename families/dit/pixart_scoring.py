"""Pictures of a mini PixArt-alpha to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence
from functools import partial

from families.common.inference import ComputeSettings
from families.common.scoring import SIDE_PX, ScoredLatents, ScoredSettings, Ways, as_uint8
from families.common.transformer_lora import open_loras
from families.dit import pixart_build
from families.dit.pixart_drawing import PixartNetworks
from families.dit.pixart_inference import PixartInferenceSettings


class ScoredPixartSettings(ScoredSettings, PixartInferenceSettings, ComputeSettings):
    """A PixArt-alpha, with what its runs trained."""


class ScoredPixart(ScoredLatents):
    """The ways through a PixArt-alpha; see `families.common.scoring.Scored`."""

    Config = ScoredPixartSettings
    pipeline = PixartNetworks
    open_loras = staticmethod(partial(open_loras, pixart_build.denoiser))
    scripts = "train_pixart or train_pixart_lora"

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        seeds = [seed + i for i in range(len(prompts))]
        latents = self.networks.draw(prompts, "", (SIDE_PX, SIDE_PX), seeds, **self.sampling)
        return {self.best: as_uint8(self.networks.decode(latents))}
