"""Pictures of a mini Cosmos-Predict2 to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence
from functools import partial

from families.common.inference import ComputeSettings
from families.common.scoring import SIDE_PX, ScoredLatents, ScoredSettings, Ways, as_uint8
from families.common.transformer_lora import open_loras
from families.cosmos import build
from families.cosmos.drawing import CosmosNetworks
from families.cosmos.inference import CosmosInferenceSettings
from families.cosmos.sampling import published_noise


class ScoredCosmosSettings(ScoredSettings, CosmosInferenceSettings, ComputeSettings):
    """A Cosmos-Predict2, with what its runs trained."""


class ScoredCosmos(ScoredLatents):
    """The ways through a Cosmos-Predict2; see `families.common.scoring.Scored`."""

    Config = ScoredCosmosSettings
    pipeline = CosmosNetworks
    open_loras = staticmethod(partial(open_loras, build.transformer))
    scripts = "train_cosmos or train_cosmos_lora"

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
        return {self.best: as_uint8(self.networks.decode(latents))}
