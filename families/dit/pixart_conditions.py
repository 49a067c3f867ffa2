"""What PixArt-alpha is told beside noised latents and times."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from families.common.features import lengths_name
from families.common.t5 import padded, token_mask
from warpcore.transfer import to_device

FEATURE = "text"
"""States of T5 (B, N, D), as caches hold them."""
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
SIZE, RATIO = "resolution", "aspect_ratio"


def told(texts: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """States of texts and their lengths by the names of the network's conditions: (B, L, D) and (B, L)."""
    return {
        TEXT: padded(texts[FEATURE].float(), length),
        MASK: token_mask(texts[lengths_name(FEATURE)], length),
    }


def own_empty_text(network: nn.Module) -> Tensor | None:
    """The network's own empty text (L, D) float32, without gradients; None where its weights had none."""
    return None if network.y_embedding is None else network.y_embedding.detach().float()


def without_text(conditions: Mapping[str, Tensor], own: Tensor | None, empty: Mapping[str, Tensor]) -> dict:
    """Conditions with an empty text in place of theirs.

    Args:
        own: the network's: it is seen through the mask of the text whose place it takes, as published.
        empty: the condition of "" (1, ...), which stands in where a network has none of its own.
    """
    if own is not None:
        return dict(conditions) | {TEXT: own.expand_as(conditions[TEXT])}
    return dict(conditions) | {name: empty[name].expand_as(conditions[name]) for name in (TEXT, MASK)}


def sizes(size: Tensor, bucket: Tensor) -> dict[str, Tensor]:
    """The conditions of networks of 1024-MS, of sizes (B, 2) in px: of the picture, and of its bucket (H, W)."""
    return {SIZE: size.float(), RATIO: (bucket[:, :1] / bucket[:, 1:]).float()}


def whole_pictures(count: int, size: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """The same of `count` pictures to draw."""
    both = to_device(torch.tensor([size], dtype=torch.float32), device).expand(count, -1)
    return sizes(both, both)
