"""Pictures of a mini Stable Diffusion to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence

from families.common.inference import ComputeSettings
from families.common.scoring import SIDE_PX, ScoredLatents, ScoredSettings, Ways, as_uint8
from families.stable_diffusion import build
from families.stable_diffusion.drawing import StableDiffusionNetworks
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.lora import open_loras


class ScoredSdSettings(ScoredSettings, SdInferenceSettings, ComputeSettings):
    """A Stable Diffusion, with what its runs trained."""


class ScoredStableDiffusion(ScoredLatents):
    """The ways through a Stable Diffusion; see `families.common.scoring.Scored`."""

    Config = ScoredSdSettings
    pipeline = StableDiffusionNetworks
    open_loras = staticmethod(open_loras)
    scripts = "train_sd or train_sd_lora"

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        settings, steps, sampler = self.settings, self.sampling["steps"], self.sampling["sampler"]
        diffusion, times = build.sampling_process(settings, steps, sampler)
        read = self.networks.read([*prompts, ""])
        sides = [{name: all_[:-1] for name, all_ in read.items()}, {name: all_[-1:] for name, all_ in read.items()}]
        sides[1] = {name: one.expand(len(prompts), *one.shape[1:]) for name, one in sides[1].items()}
        side = SIDE_PX // build.latents_of(settings)[1]
        latents = self.networks.draw(
            *sides, (side, side), [seed + i for i in range(len(prompts))], diffusion=diffusion, times=times,
            guidance_rescale=0.0, **self.sampling,
        )  # fmt: skip
        return {self.best: as_uint8(self.networks.decode(latents))}
