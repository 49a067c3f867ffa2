"""What the networks are told beside noised latents and times."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from families.common.features import lengths_name
from families.common.t5 import padded, token_mask
from families.open_sora.config import PICTURE_FPS
from families.open_sora.versions import FLOW, Version

FEATURE = "text"
"""States of T5 (B, N, D), as caches hold them."""
Conditions = dict[str, Tensor]
OF_CLIPS = ("fps", "height", "width")


class Denoiser(nn.Module):
    """A network, given those of the conditions that it takes, and asked for what a loss learns: an STDiT3's target
    without the channels that published ones predict beyond it."""

    def __init__(self, network: nn.Module, version: Version):
        super().__init__()
        self.network, self.version = network, version

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor | None) -> Tensor:
        """See `forward` of the networks."""
        return self.network(x, t, **asked_of(self.version, conditions))


def asked_of(version: Version, conditions: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What a network is called with, beside latents and times: of `of_clips` it may not be told all."""
    taken = {name: one for name, one in conditions.items() if name in version.kind.conditions or name not in OF_CLIPS}
    return taken | ({"target_alone": True} if version.target == FLOW else {})


def told(texts: Mapping[str, Tensor], length: int) -> Conditions:
    """States of texts and their lengths by the names of the network's conditions: (B, L, D) and (B, L)."""
    return {
        "y": padded(texts[FEATURE].float(), length),
        "mask": token_mask(texts[lengths_name(FEATURE)], length),
    }


def of_clips(size: Sequence[int], fps: Tensor) -> Conditions:
    """Size and frame rate of clips (T, H, W) in px: (B,) each.

    fps: (B,) frames per second; pictures, which have 0, are told to the network by a number of their own.
    """
    fps = fps.float()
    told_fps = torch.where(fps > 0, fps, PICTURE_FPS) if size[0] > 1 else torch.full_like(fps, PICTURE_FPS)
    return {"fps": told_fps, **{name: torch.full_like(fps, side) for name, side in zip(("height", "width"), size[1:],
                                                                                       strict=True)}}  # fmt: skip


def without_text(conditions: Conditions) -> Conditions:
    """Conditions with the network's own empty text in place of theirs, seen through their masks, as published."""
    return conditions | {"dropped": torch.ones_like(conditions["mask"][:, 0], dtype=torch.bool)}
