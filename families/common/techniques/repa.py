"""REPA: hidden tokens are aligned with the patches of a frozen image encoder (arXiv:2410.06940).

    noised latents -> blocks 1 .. k -> x (B, N, C) -> projector -> (B, N, D)
    clean pictures -> frozen encoder -> patches (B, N, D), one for each token
    alignment = -mean over tokens of cos(projected, patch)        loss = denoising loss + weight * alignment

The projector is trained with the network, and is no part of exported weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from families.common.techniques.blocks import check_tokens, share_of_depth
from families.common.techniques.tread import TokenRouting
from modules.blocks import Block, compile_blocks, set_activation_checkpointing
from warpcore.config import Settings
from warpcore.errors import ConfigError
from warpcore.keys import Weights
from warpcore.networks import HasTokens

PUBLISHED_BLOCK = 8


class RepaSettings(Settings):
    """Settings of `repa`."""

    encoder: Weights = Path("facebook/dinov2-base")
    """The frozen image encoder: a DINOv2 of transformers (folder or hub name), or the file of an image tower, such as
    `models/mini/image_tower.safetensors`."""
    block: PositiveInt | None = None
    """The block, counted from 1, whose output is aligned; by default the 8th of 28, or as large a share."""
    weight: NonNegativeFloat = 0.5
    """Weight of the alignment beside the denoising loss."""
    projector_width: PositiveInt = Field(2048, le=65_536)
    """Width of the two hidden layers of the projector."""

    def block_of(self, depth: int) -> int:
        """The number, from 1, of the block whose output is aligned, of a network with `depth` blocks.

        Raises:
            ConfigError: there is no such block.
        """
        block = share_of_depth(PUBLISHED_BLOCK, depth) if self.block is None else self.block
        if block > depth:
            raise ConfigError(f"repa: block {block} of {depth}: write a block from 1 to {depth}")
        return block


class _Layers(Block):
    wide = True

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compute(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


class Projector(nn.Module):
    """Three linear layers with SiLU between them: tokens (B, N, C) -> (B, N, D)."""

    def __init__(self, token_width: int, inner: int, patch_width: int):
        super().__init__()
        self.mlp = _Layers([token_width, inner, inner, patch_width])

    @property
    def blocks(self) -> list[Block]:
        return [self.mlp]

    def set_activation_checkpointing(self, level: int) -> None:
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        compile_blocks(self.blocks, graphs)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class HiddenTokens:
    """What a block of a network gives, taken while `wanted`.

    Raises:
        UserError: the network is no transformer whose blocks transform tokens, or has too few of them.
    """

    wanted = False
    tokens: Tensor | None = None
    """(B, n, C)."""
    places: Tensor | None = None
    """Which of the N tokens these are (B, n), where others skip the block; None: all."""

    def __init__(self, network: HasTokens, settings: RepaSettings, routing: TokenRouting | None = None):
        check_tokens(network, "repa")
        blocks, self._routing = list(network.blocks), routing
        blocks[settings.block_of(len(blocks)) - 1].register_forward_hook(self._take)

    def _take(self, block: nn.Module, inputs: tuple, made: Tensor) -> None:
        if self.wanted:
            self.tokens, self.places = made, self._routing and self._routing.kept

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, they are taken, to be released afterwards."""
        self.wanted = True
        try:
            yield
        finally:
            self.wanted = False

    def release(self) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, n, C) and places (B, n) or None of the last forward pass, which are kept no longer."""
        released = self.tokens, self.places
        self.tokens = self.places = None
        return released


def alignment(projected: Tensor, patches: Tensor) -> Tensor:
    """The negative cosine similarity (B, N) of each token (B, N, D) to the patch at its place."""
    return -F.cosine_similarity(projected.float(), patches.float(), dim=-1)
