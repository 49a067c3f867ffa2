"""What techniques ask of a network: blocks of a transformer, and their number."""

from torch import nn

from warpcore.errors import UserError
from warpcore.networks import has_tokens

PUBLISHED_DEPTH = 28
"""Blocks of DiT-XL/2 and SiT-XL/2, for which papers name places."""


def check_tokens(network: nn.Module, key: str) -> None:
    """Raise UserError where a network's blocks are not those of a transformer; `key` asks for them."""
    if not has_tokens(network):
        raise UserError(
            f"{key}: works on the tokens of a transformer whose blocks follow one another, and "
            f"{type(network).__name__} is none; remove the key"
        )


def share_of_depth(blocks: int, depth: int) -> int:
    """How many blocks of a network with `depth` are what `blocks` are of the published 28; at least one."""
    return max(1, round(blocks * depth / PUBLISHED_DEPTH))
