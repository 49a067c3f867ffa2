"""Clips of a mini Latte to be scored: drawn for names of motions, and rebuilt from given ones."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from families.common.clips import clip_moments, decoded_clips
from families.common.pictures import to_pictures
from families.common.scoring import ScoredSettings, Ways
from families.dit.drawing import LatteNetworks
from families.dit.inference import LatteInferenceSettings
from families.dit.scoring import ScoredDit


class ScoredLatteSettings(ScoredSettings, LatteInferenceSettings):
    """A Latte, of a run."""


class ScoredLatte(ScoredDit):
    """The ways through a Latte, at the size of its training; see `families.common.scoring.Scored`."""

    Config = ScoredLatteSettings
    pipeline = LatteNetworks
    scripts = "train_latte"
    draws_clips = True

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        side = self.settings.trained_px
        latents = self.latents(prompts, (self.settings.clip_frames, side, side), seed)
        return {self.best: [to_pictures(clip) for clip in self.networks.decode(latents)]}

    def rebuild(self, clips: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        at_once = self.settings.autoencoder_frames
        with self.networks.holding("autoencoder", self.pipeline.build_autoencoder) as autoencoder:
            moments = [clip_moments(autoencoder, self._at_size(clip)[None], at_once) for clip in clips]
            made = [decoded_clips(autoencoder, autoencoder.scale.latents(one, None), at_once)[0] for one in moments]
        return {self.autoencoder: [to_pictures(clip) for clip in made]}

    def _at_size(self, clip: np.ndarray) -> Tensor:
        """A clip, uint8 (T, H, W, 3), as the network is trained with it: (T, 3, H, W)."""
        side, frames = self.settings.trained_px, torch.from_numpy(clip).movedim(-1, -3)
        return F.interpolate(frames, (side, side), mode="bilinear", antialias=True)
