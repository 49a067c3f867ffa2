"""Pictures of a mini Cosmos-Predict2 to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence

import numpy as np
import torch

from families.common.inference import ComputeSettings
from families.common.scoring import SIDE_PX, ScoredSettings, Ways, as_uint8
from families.cosmos import build
from families.cosmos.drawing import CosmosNetworks
from families.cosmos.inference import CosmosInferenceSettings
from families.cosmos.lora import Loras, open_loras
from families.cosmos.sampling import published_noise
from warpcore.errors import UserError

DRAWN = "drawn"


class ScoredCosmosSettings(ScoredSettings, CosmosInferenceSettings, ComputeSettings):
    """A Cosmos-Predict2, with what its runs trained."""


class ScoredCosmos:
    """The ways through a Cosmos-Predict2; see `families.common.scoring.Scored`. It has no ControlNets."""

    Config = ScoredCosmosSettings
    best, autoencoder = DRAWN, "autoencoder"

    def __init__(
        self, settings: ScoredCosmosSettings, loras: Loras = (), *, steps: int, guidance: float, sampler: str
    ):
        self.settings = settings
        self.networks = CosmosNetworks(settings, loras)
        self.sampling = {"steps": steps, "guidance": guidance, "sampler": sampler}

    def with_lora(self) -> "ScoredCosmos":
        settings = self.settings
        return ScoredCosmos(settings, open_loras(settings.lora, settings, settings.use_ema), **self.sampling)

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        texts = list(dict.fromkeys(prompts))
        read = self.networks.read([*texts, ""])
        sides = [
            {name: all_[[texts.index(prompt) for prompt in prompts]] for name, all_ in read.items()},
            {name: all_[-1:] for name, all_ in read.items()},
        ]
        side = SIDE_PX // build.latents_of(self.settings)[1]
        seeds = [seed + i for i in range(len(prompts))]
        noise = published_noise(seeds, (build.transformer_numbers(self.settings)["in_channels"], side, side))
        latents = self.networks.draw(*sides, (side, side), seeds, noise=noise, **self.sampling)
        return {DRAWN: as_uint8(self.networks.decode(latents))}

    def controlled(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seed: int) -> Ways:
        raise UserError(
            "there are no ControlNets of Cosmos-Predict2: score a run of train_cosmos or train_cosmos_lora"
        )

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        given = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
        with self.networks.holding("autoencoder", build.autoencoder) as autoencoder:
            moments = [autoencoder.moments(picture[None]) for picture in given]
            made = [autoencoder.decode(autoencoder.scale.latents(one, None))[0] for one in moments]
        return {self.autoencoder: as_uint8(made)}

    def notes(self, pictures: Sequence[np.ndarray]) -> list[str]:
        return [self.networks.peak_memory()]
