"""T-LoRA (arXiv:2507.05964, section 3.2): the noisier a sample is, the lower the rank of the LoRA that changes its
network, so that what the network knew decides the large forms, and a LoRA of few pictures does not copy theirs.

Its orthogonal start (Ortho-LoRA, section 3.3) is not here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from modules.lora import adapters

_ROUNDING = 1e-4
"""Of a rank: a product that comes out a rounding below a whole number is that number."""


def ranks_at(levels: Tensor, rank: int, min_rank: int) -> Tensor:
    """The ranks (B,) int64 at levels (B,) from 0 (clean), where it is `rank`, to 1 (noise), where it is `min_rank`."""
    return ((rank - min_rank) * (1 - levels) + _ROUNDING).floor().long() + min_rank


def follow_noise(network: nn.Module, level: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Let adapters that have a `min_rank` have the rank of the samples that the network is called with, from now on;
    as a context, inside it.

    The rank of a call holds until the next one: also in a backward pass that computes activations again.

    Args:
        network: is called as network(x, r, ...), r (B,) being the noise condition.
        level: makes levels (B,) from 0 (clean) to 1 (noise) of it.
    """
    following = [adapter for _, _, adapter in adapters(network) if adapter.settings.min_rank is not None]
    if not following:
        return nullcontext()

    def tell(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        levels, kept = level(inputs[1]), {}
        for adapter in following:
            own = adapter.settings.rank, adapter.settings.min_rank
            if own not in kept:
                columns = torch.arange(own[0], device=levels.device)
                kept[own] = columns < ranks_at(levels, *own)[:, None]
            adapter.kept = kept[own]

    return network.register_forward_pre_hook(tell)
