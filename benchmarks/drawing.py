"""Pictures of a mini cascade to be scored: drawn for prompts, and rebuilt from given ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from families.cascade import build
from families.cascade.drawing import finish, sketch
from families.cascade.inference import DrawingSettings
from families.cascade.lora_formats import Lora
from families.cascade.sampling import Cascade
from families.common.pictures import to_pictures
from families.common.pipeline import Size
from families.common.sampling import latent_size

SIDE_PX = 128


class ScoredSettings(DrawingSettings):
    """A cascade, with what its runs trained for Stage C."""

    lora: list[str] = []
    controlnet: list[Path] = []


class Drawing:
    """The ways through a cascade; without weights of Stage B, only those that need none. Pictures are uint8
    (H, W, 3)."""

    def __init__(self, settings: DrawingSettings, loras: Sequence[tuple[Lora, float]] = (), **sampling):
        self.settings, self.cascade, self.sampling = settings, Cascade(settings, loras), sampling
        self.has_stage_b = settings.stage_b.generator_checkpoint_path is not None
        self.best = "drawn" if self.has_stage_b else "previewed"

    def draw(
        self, prompts: Sequence[str], seed: int, size: Size = (SIDE_PX, SIDE_PX), **steering
    ) -> dict[str, list[np.ndarray]]:
        """Pictures of each prompt: `drawn` by the whole cascade, `previewed` by the previewer.

        **steering: ControlNets, see `Cascade.draw_c`.
        """
        seeds = [seed + i for i in range(len(prompts))]
        made = sketch(self.cascade, prompts, seeds, size, **self.sampling, **steering)
        pictures = {"previewed": as_uint8(self.cascade.preview(made.latents))}
        return pictures | ({"drawn": as_uint8(finish(self.cascade, made))} if self.has_stage_b else {})

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """What each way makes of given pictures."""
        given = [torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures]
        sizes, seeds = [tuple(picture.shape[1:]) for picture in given], list(range(len(given)))
        compression = self.cascade.settings.version.compression
        latents = self.cascade.encode(given, [latent_size(*size, compression) for size in sizes])
        ways = {
            "Stage A": as_uint8(self.cascade.rebuild(given)),
            "encoder, previewer": as_uint8(self.cascade.preview(latents)),
        }
        if self.has_stage_b:
            pooled = self.cascade.read([*texts, ""])["clip_text_pooled"]
            stage_a = self.cascade.draw_b(latents, pooled[:-1], pooled[-1:], sizes, seeds)
            ways["encoder, B, A"] = as_uint8(self.cascade.decode(stage_a, sizes))
        return ways

    def share_of_codes_used(self, pictures: Sequence[np.ndarray]) -> float:
        """How much of Stage A's codebook the pictures use."""
        with self.cascade.holding("Stage A", build.stage_a) as stage_a:
            used = set()
            for picture in pictures:
                latents = stage_a.encode(torch.from_numpy(picture).permute(2, 0, 1)[None].to(stage_a.codes) / 255)
                used.update(stage_a.quantise(latents).indices.flatten().tolist())
            return len(used) / len(stage_a.codes)


def as_uint8(pictures: Sequence[Tensor]) -> list[np.ndarray]:
    """Pictures (3, H, W) in [0, 1] as uint8 (H, W, 3)."""
    return [to_pictures(picture[None])[0] for picture in pictures]
