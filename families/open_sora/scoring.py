"""Clips of a mini STDiT3 to be scored: drawn for sentences, and rebuilt from given ones."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from families.common.pictures import to_pictures
from families.common.scoring import ScoredLatents, ScoredSettings, Ways
from families.common.transformer_lora import open_loras
from families.open_sora import build
from families.open_sora.drawing import OpenSoraNetworks
from families.open_sora.inference import OpenSoraInferenceSettings


class ScoredOpenSoraSettings(ScoredSettings, OpenSoraInferenceSettings):
    """A network of Open-Sora, with what its runs trained."""

    of_training = ("num_frames", "image_size", "frame_rate")
    batch_size: PositiveInt = 25
    num_frames: PositiveInt = 17
    image_size: PositiveInt = 64
    frame_rate: PositiveFloat = 8.0


class ScoredOpenSora(ScoredLatents):
    """The ways through Open-Sora, at the size of the run's training; see `families.common.scoring.Scored`."""

    Config = ScoredOpenSoraSettings
    pipeline = OpenSoraNetworks
    open_loras = staticmethod(partial(open_loras, build.network))
    scripts = "train_stdit or train_stdit_lora"
    draws_clips = True

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        settings, networks = self.settings, self.networks
        size = (settings.num_frames, settings.image_size, settings.image_size)
        with networks.holding("autoencoder", networks.build_autoencoder) as autoencoder:
            latent_frames = autoencoder.latent_frames(settings.num_frames)
        latents = networks.draw(
            prompts, "", size, latent_frames, [seed + i for i in range(len(prompts))], fps=settings.frame_rate,
            **self.sampling,
        )  # fmt: skip
        return {self.best: _as_uint8(networks.decode_clips(latents, settings.num_frames))}

    def rebuild(self, clips: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        frames = self.settings.num_frames
        given = [torch.from_numpy(_spread(clip, frames)).movedim(-1, -3) for clip in clips]
        with self.networks.holding("autoencoder", self.pipeline.build_autoencoder) as autoencoder:
            moments = [autoencoder.clip_moments(clip[None], None) for clip in given]
            latents = [autoencoder.scale.latents(one, None) for one in moments]
            made = [autoencoder.decoded_clips(one, frames)[0] for one in latents]
        return {self.autoencoder: _as_uint8(made)}


def _spread(clip: np.ndarray, frames: int) -> np.ndarray:
    """`frames` frames of a clip, from its first on, as far apart as its length allows: (T, H, W, 3)."""
    step = (len(clip) - 1) // max(frames - 1, 1)
    return np.ascontiguousarray(clip[:: max(step, 1)][:frames])


def _as_uint8(clips: Sequence[Tensor]) -> list[np.ndarray]:
    """Clips (T, 3, H, W) in [0, 1] as uint8 (T, H, W, 3)."""
    return [to_pictures(clip) for clip in clips]
