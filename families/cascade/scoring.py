"""Pictures of a mini cascade to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from families.cascade import build
from families.cascade.controlled import Control
from families.cascade.controlnet import load_controlnet
from families.cascade.drawing import finish, sketch
from families.cascade.inference import DrawingSettings
from families.cascade.lora import open_loras
from families.cascade.lora_formats import Lora
from families.cascade.sampling import Cascade
from families.common.sampling import latent_size
from families.common.scoring import SIDE_PX, ScoredSettings, Ways, as_uint8
from warpcore.diffusion.samplers import SAMPLERS


class ScoredCascadeSettings(ScoredSettings, DrawingSettings):
    """A cascade, with what its runs trained for Stage C."""

    stage_b_sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """Sampler of Stage B."""
    controlnet_filter: str | None = None
    """The filter of a ControlNet whose file names a filter of your own, as in its training config."""


class ScoredCascade:
    """The ways through a cascade; without weights of Stage B, only those that need none.

    See `families.common.scoring.Scored`.
    """

    Config = ScoredCascadeSettings
    autoencoder, draws_classes, draws_clips = "Stage A", False, False

    def __init__(self, settings: ScoredCascadeSettings, loras: Sequence[tuple[Lora, float]] = (), **sampling):
        self.settings, self.cascade, self.sampling = settings, Cascade(settings, loras), sampling
        self.has_stage_b = settings.stage_b.generator_checkpoint_path is not None
        self.best = "drawn" if self.has_stage_b else "previewed"

    def with_lora(self) -> "ScoredCascade":
        settings = self.settings
        return ScoredCascade(settings, open_loras(settings.lora, settings, settings.use_ema), **self.sampling)

    def draw(self, prompts: Sequence[str], seed: int, **steering) -> Ways:
        """`drawn` by the whole cascade, `previewed` by the previewer.

        **steering: ControlNets, see `Cascade.draw_c`.
        """
        seeds = [seed + i for i in range(len(prompts))]
        made = sketch(self.cascade, prompts, seeds, (SIDE_PX, SIDE_PX), **self.sampling, **steering)
        pictures = {"previewed": as_uint8(self.cascade.preview(made.latents))}
        return pictures | ({"drawn": as_uint8(finish(self.cascade, made))} if self.has_stage_b else {})

    def controlled(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seed: int) -> Ways:
        ways: Ways = {"without": [], "with": [], "with, guided": []}
        (file,), most = self.settings.controlnet, self.settings.batch_size
        for i in range(0, len(prompts), most):
            residuals = self._residuals(Path(file), pictures[i : i + most])
            for way, made in ways.items():
                controls = [] if way == "without" else [Control(residuals)]
                drawn = self.draw(prompts[i : i + most], seed + i, controls=controls, control_guided="guided" in way)
                made += drawn[self.best]
        return ways

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Ways:
        given = [torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures]
        sizes, seeds = [tuple(picture.shape[1:]) for picture in given], list(range(len(given)))
        compression = self.cascade.settings.version.compression
        latents = self.cascade.encode(given, [latent_size(*size, compression) for size in sizes])
        ways = {
            self.autoencoder: as_uint8(self.cascade.rebuild(given)),
            "encoder, previewer": as_uint8(self.cascade.preview(latents)),
        }
        if self.has_stage_b:
            pooled = self.cascade.read([*texts, ""])["clip_text_pooled"]
            stage_a = self.cascade.draw_b(latents, pooled[:-1], pooled[-1:], sizes, seeds)
            ways["encoder, B, A"] = as_uint8(self.cascade.decode(stage_a, sizes))
        return ways

    def notes(self, pictures: Sequence[np.ndarray]) -> list[str]:
        return [f"they use {100 * self._share_of_codes_used(pictures):.0f} % of Stage A's codes"]

    def _share_of_codes_used(self, pictures: Sequence[np.ndarray]) -> float:
        """How much of Stage A's codebook the pictures use."""
        with self.cascade.holding("Stage A", build.stage_a) as stage_a:
            used = set()
            for picture in pictures:
                latents = stage_a.encode(torch.from_numpy(picture).permute(2, 0, 1)[None].to(stage_a.codes) / 255)
                used.update(stage_a.quantise(latents).indices.flatten().tolist())
            return len(used) / len(stage_a.codes)

    def _residuals(self, file: Path, pictures: Sequence[np.ndarray]) -> list[Tensor | None]:
        cascade = self.cascade
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        own_filter = self.settings.controlnet_filter
        said = {} if own_filter is None else {"controlnet_filter": own_filter}
        controlnet, filter = load_controlnet(file, cascade.settings, said)
        with cascade.holding("encoder", build.encoder) as encoder:
            condition = filter.to(cascade.device, encoder)(batch).condition
        with cascade.holding("ControlNet", lambda _: controlnet) as network:
            return network(condition.to(cascade.device, cascade.dtype))
