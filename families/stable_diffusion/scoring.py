"""Pictures of a mini Stable Diffusion to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence

import numpy as np
import torch

from families.common.inference import ComputeSettings
from families.common.scoring import SIDE_PX, ScoredSettings, Ways, as_uint8
from families.stable_diffusion import build
from families.stable_diffusion.drawing import StableDiffusionNetworks, sampling_process
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.lora import Loras, open_loras
from warpcore.errors import UserError

DRAWN = "drawn"


class ScoredSdSettings(ScoredSettings, SdInferenceSettings, ComputeSettings):
    """A Stable Diffusion, with what its runs trained."""


class ScoredStableDiffusion:
    """The ways through a Stable Diffusion; see `families.common.scoring.Scored`. It has no ControlNets."""

    Config = ScoredSdSettings
    best, autoencoder = DRAWN, "autoencoder"

    def __init__(self, settings: ScoredSdSettings, loras: Loras = (), *, steps: int, guidance: float, sampler: str):
        self.settings = settings
        self.networks = StableDiffusionNetworks(settings, loras)
        self.sampling = {"steps": steps, "guidance": guidance, "sampler": sampler}

    def with_lora(self) -> "ScoredStableDiffusion":
        settings = self.settings
        return ScoredStableDiffusion(settings, open_loras(settings.lora, settings, settings.use_ema), **self.sampling)

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        settings, steps, sampler = self.settings, self.sampling["steps"], self.sampling["sampler"]
        diffusion, times = sampling_process(settings, steps, sampler)
        read = self.networks.read([*prompts, ""])
        sides = [{name: all_[:-1] for name, all_ in read.items()}, {name: all_[-1:] for name, all_ in read.items()}]
        sides[1] = {name: one.expand(len(prompts), *one.shape[1:]) for name, one in sides[1].items()}
        side = SIDE_PX // build.latents_of(settings)[1]
        latents = self.networks.draw(
            *sides, (side, side), [seed + i for i in range(len(prompts))], diffusion=diffusion, times=times,
            guidance_rescale=0.0, **self.sampling,
        )  # fmt: skip
        return {DRAWN: as_uint8(self.networks.decode(latents))}

    def controlled(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seed: int) -> Ways:
        raise UserError("ControlNets of Stable Diffusion are not supported: score a run of train_sd or train_sd_lora")

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        given = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
        with self.networks.holding("autoencoder", build.autoencoder) as autoencoder:
            moments = [autoencoder.moments(picture[None]) for picture in given]
            made = [autoencoder.decode(autoencoder.scale.latents(one, None))[0] for one in moments]
        return {self.autoencoder: as_uint8(made)}

    def notes(self, pictures: Sequence[np.ndarray]) -> list[str]:
        return [self.networks.peak_memory()]
