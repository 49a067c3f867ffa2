"""Drawing clips with NOVA from seeds, by a network that is in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from families.nova.generation import Drawing, SeededDraws, draw_frames
from modules.nova import NOVATransformer
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom


def draw_clips(
    network: NOVATransformer,
    diffusion: GDF,
    drawing: Drawing,
    seeds: Sequence[int],
    frames: int,
    condition: Tensor,
    unconditional: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Scaled latents (B, C, T, H, W) of clips, or pictures, that seeds stand for: the same seed, the same numbers, in
    any batch. Arguments are those of `families.nova.generation.draw_frames`."""
    draws = SeededDraws(SampleRandom(seeds, condition.device))
    drawn = draw_frames(network, diffusion, drawing, draws, frames, condition, unconditional, first)
    return torch.stack(list(drawn), dim=2)
