"""Drawing latents of clips with the networks of Open-Sora."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from families.common.sampling import draw_latents
from families.open_sora.conditions import Conditions, Denoiser, without_text
from warpcore.diffusion.diffusion import GDF


def draw_clips(
    diffusion: GDF,
    network: Denoiser,
    conditions: Conditions,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    away: Conditions | None = None,
    **sampling: Any,
) -> Tensor:
    """Draw latents (B, *shape) of clips of one size; shape is (C, T, h, w).

    Args:
        conditions: of `families.open_sora.conditions`: of the texts and of the clips.
        away: conditions of texts that guidance leads away from; by default the network's own empty text.
        sampling: other arguments of `draw_latents`; see `families.open_sora.build.drawing_shift` for its `shift`.
    """
    kept = torch.zeros_like(conditions["mask"][:, 0], dtype=torch.bool)
    conditions = conditions | {"dropped": kept}
    unconditional = without_text(conditions) if away is None else conditions | away
    return draw_latents(diffusion, network, conditions, unconditional, shape, seeds, guidance_rescale=0.0, **sampling)
