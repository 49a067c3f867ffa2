"""Pictures and clips of a mini NOVA to be scored: drawn for sentences, and rebuilt from given ones."""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from families.common.pictures import to_pictures
from families.common.scoring import ScoredLatents, ScoredSettings, Ways, class_numbers
from families.nova.drawing import NovaNetworks, Plan
from families.nova.generation import Drawing
from families.nova.guidance import TokenGuidance
from families.nova.inference import NovaInferenceSettings

EXAMPLE = "quickstart_nova_classes.yaml"
"""A config that names the classes of the demo set."""


class ScoredNovaSettings(ScoredSettings, NovaInferenceSettings):
    """A NOVA, with what its runs trained."""

    batch_size: PositiveInt = 25


class ScoredNova(ScoredLatents):
    """The ways through NOVA, at the size and with the groups of the run; see `families.common.scoring.Scored`."""

    Config = ScoredNovaSettings
    pipeline = NovaNetworks
    open_loras = staticmethod(lambda *_: [])
    scripts = "train_nova"

    @property
    def draws_clips(self) -> bool:
        return self.settings.version.draws_clips

    @property
    def draws_classes(self) -> bool:
        return self.settings.num_classes is not None

    def draw(self, prompts: Sequence[str], seed: int) -> Ways:
        settings, drawn = self.settings, {}
        saved = settings.of_run
        size = (saved["num_frames"], *settings.trained_px)
        drawing = Drawing(saved["sample_groups"], self.sampling["steps"], TokenGuidance(self.sampling["guidance"]))
        plan = Plan(size, drawing, motion=settings.told_motion)
        seeds = [seed + i for i in range(len(prompts))]
        draw = self.networks.draw
        if self.draws_classes:
            draw, prompts = self.networks.draw_classes, class_numbers(prompts, settings.class_names, EXAMPLE)
        draw(prompts, seeds, plan, lambda number, clip: drawn.update({number: self._shown(clip)}))
        return {self.best: [drawn[number] for number in range(len(prompts))]}

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        frames = self.settings.of_run["num_frames"]
        clips = (torch.from_numpy(one if one.ndim == 4 else one[None])[:frames].movedim(-1, -3) for one in pictures)
        with self.networks.holding("autoencoder", self.pipeline.build_autoencoder) as autoencoder:
            moments = [autoencoder.clip_moments(clip[None].to(self.networks.device)) for clip in clips]
            made = [autoencoder.decoded_clips(autoencoder.scale.latents(one, None))[0] for one in moments]
        return {self.autoencoder: [self._shown(clip) for clip in made]}

    def _shown(self, clip: Tensor) -> np.ndarray:
        """A clip (T, 3, H, W) in [0, 1] as uint8, of networks of pictures the only frame."""
        shown = to_pictures(clip)
        return shown if self.draws_clips else shown[0]
