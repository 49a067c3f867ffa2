"""Stage A: the auto-encoder between pictures and the latents of Stage B, a VQGAN with little compression.

The quantised auto-encoder of Paella (arXiv:2211.07292), in the form published with Stable Cascade. Constructor
arguments, parameter names and shapes are those of the official checkpoint.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import (
    Block,
    Conv,
    DepthwiseConv,
    PointwiseConv,
    TransposedConv,
    set_activation_checkpointing,
)

# Entries of the table (positions x codes) of the nearest neighbour search that exist at a time: 64 MB of float32.
TABLE_ENTRIES = 2**24


class Quantised(NamedTuple):
    """Latents replaced by their nearest codes, and what training wants to know about it.

    latents: (B, C, H, W), scaled as those of `encode`; gradients pass to the latents that were quantised, as if
        nothing had been replaced (arXiv:1711.00937, section 3.2).
    indices: (B, H, W) int64, rows of the codebook.
    commitment: (B,), mean squared distance to the codes, which pulls the encoder only.
    """

    latents: Tensor
    indices: Tensor
    commitment: Tensor


class StageA(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] <-> latents (B, c_latent, H / compression, W / compression).

    Args:
        levels: number of sizes; each halves the sides, the first by putting 2x2 pixels into the channels.
        bottleneck_blocks: blocks of the decoder's innermost level; every other level has one, in both directions.
        c_hidden: channels of the innermost level; halved with each level further out.
        c_latent: channels of the latents.
        codebook_size: number of codes.
        scale_factor: of the published latents; they are divided by it, so that Stage B sees numbers of a larger size.
    """

    forward_methods = ("encode", "decode")  # called from outside like `forward`

    def __init__(
        self,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        c_hidden: int = 384,
        c_latent: int = 4,
        codebook_size: int = 8192,
        scale_factor: float = 0.43,
    ):
        super().__init__()
        self.compression, self.scale_factor = 2**levels, scale_factor
        widths = [c_hidden // 2**level for level in reversed(range(levels))]

        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), PointwiseConv(3 * 4, widths[0]))
        down = [MixingBlock(widths[0])]
        for c_from, c_to in pairwise(widths):
            down += [Conv(c_from, c_to, kernel_size=4, stride=2, padding=1), MixingBlock(c_to)]
        to_latents = nn.Sequential(PointwiseConv(c_hidden, c_latent, bias=False), nn.BatchNorm2d(c_latent))
        self.down_blocks = nn.Sequential(*down, to_latents)

        self.vquantizer = nn.ModuleDict({"codebook": Codebook(codebook_size, c_latent)})

        up = [MixingBlock(c_hidden) for _ in range(bottleneck_blocks)]
        for c_from, c_to in pairwise(reversed(widths)):
            up += [TransposedConv(c_from, c_to, kernel_size=4, stride=2, padding=1), MixingBlock(c_to)]
        self.up_blocks = nn.Sequential(nn.Sequential(PointwiseConv(c_latent, c_hidden)), *up)
        self.out_block = nn.Sequential(PointwiseConv(widths[0], 3 * 4), nn.PixelShuffle(2))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Ready for training from scratch; sets every parameter and buffer, also after `to_empty`.

        As published (Xavier, blocks that start as the identity: arXiv:2003.04887), but for the codes. Latents come out
        of a batch norm, so codes are drawn from a standard normal too, where the published +- 1 / codebook_size leaves
        most of them without any latent near.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, MixingBlock):
                nn.init.zeros_(module.gammas)
        nn.init.normal_(self.codes)

    @property
    def codes(self) -> Tensor:
        """The codebook (codebook_size, c_latent), before the division by `scale_factor`; no gradient moves it."""
        return self.vquantizer["codebook"].weight

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order they run: what `compile`, `fully_shard` and checkpointing are applied to."""
        return [module for module in (*self.down_blocks, *self.up_blocks) if isinstance(module, Block)]

    def set_activation_checkpointing(self, level: int) -> None:
        """0 keeps all activations, 3 computes all again in the backward pass: see `modules.blocks`."""
        set_activation_checkpointing(self.blocks, level)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, c_latent, H / compression, W / compression), not quantised, of pictures (B, 3, H, W) in [0, 1].

        Raises ValueError where `compression` does not divide the sides.
        """
        if pictures.shape[-2] % self.compression or pictures.shape[-1] % self.compression:
            raise ValueError(
                f"StageA cannot encode pictures of {pictures.shape[-2]} x {pictures.shape[-1]} pixels: crop or resize "
                f"them to sides that are multiples of {self.compression}"
            )
        unshuffle, mapping = self.in_block
        x = mapping(unshuffle(pictures.to(mapping.weight.dtype)).permute(0, 2, 3, 1))
        mapping, norm = self.down_blocks[-1]
        return norm(mapping(self.down_blocks[:-1](x)).permute(0, 3, 1, 2)) / self.scale_factor

    def quantise(self, latents: Tensor) -> Quantised:
        """Replace latents (B, c_latent, H, W), scaled as those of `encode`, by their nearest codes."""
        x = latents.permute(0, 2, 3, 1) * self.scale_factor
        indices = nearest(x, self.codes)
        quantised = F.embedding(indices, self.codes)
        through = x + (quantised - x).detach()
        return Quantised(
            latents=through.permute(0, 3, 1, 2) / self.scale_factor,
            indices=indices,
            commitment=(x - quantised.detach()).square().mean(dim=(1, 2, 3)),
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about in [0, 1], of latents (B, c_latent, H / compression, W / compression)."""
        mapping, shuffle = self.out_block
        x = latents.to(mapping.weight.dtype).permute(0, 2, 3, 1) * self.scale_factor
        return shuffle(mapping(self.up_blocks(x)).permute(0, 3, 1, 2))

    def forward(self, pictures: Tensor, quantised: Tensor | None = None) -> tuple[Tensor, Tensor, Quantised]:
        """What training needs: rebuilt pictures (B, 3, H, W), the latents of `encode`, and their quantisation.

        quantised: (B,) bool, which samples are rebuilt from codes; the others from plain latents, as Stage B's are.
            All of them without it.
        """
        latents = self.encode(pictures)
        found = self.quantise(latents)
        taken = found.latents
        if quantised is not None:
            taken = torch.where(quantised[:, None, None, None], taken, latents)
        return self.decode(taken), latents, found


class Codebook(nn.Module):
    """`weight` (codebook_size, c_latent), a buffer: codes are averages of the latents that choose them."""

    weight: Tensor

    def __init__(self, codebook_size: int, c_latent: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(codebook_size, c_latent))


class MixingBlock(Block):
    """Mixes neighbours, then channels, of (B, H, W, C), each behind a norm and weighted by learnt numbers."""

    wide = True

    def __init__(self, c: int):
        super().__init__()
        # The official names count a padding layer.
        self.depthwise = nn.Sequential(nn.Identity(), DepthwiseConv(c, 3, padding_mode="replicate"))
        self.channelwise = nn.Sequential(nn.Linear(c, c * 4), nn.GELU(), nn.Linear(c * 4, c))
        self.gammas = nn.Parameter(torch.zeros(6))  # scale, shift and weight of each half

    def compute(self, x: Tensor) -> Tensor:
        scale, shift, weight, scale2, shift2, weight2 = self.gammas
        x = torch.addcmul(x, self.depthwise(modulated_norm(x, scale, shift)), weight)
        return torch.addcmul(x, self.channelwise(modulated_norm(x, scale2, shift2)), weight2)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm of the cascade, over the channels of (..., C), times 1 + scale (), plus shift ()."""
    c = x.shape[-1]
    return F.layer_norm(x, (c,), (1 + scale).expand(c), shift.expand(c), eps=1e-6)


@torch.no_grad()
def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Rows of `codes` (N, C) nearest to each vector of x (..., C), in float32 at least: (...) int64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat, codes = x.flatten(0, -2).to(dtype), codes.to(dtype)
    chunks = flat.split(max(1, TABLE_ENTRIES // len(codes)))
    # Without matrix products, which lose the digits of a small distance between large numbers.
    tables = (torch.cdist(chunk, codes, compute_mode="donot_use_mm_for_euclid_dist") for chunk in chunks)
    return torch.cat([table.argmin(dim=1) for table in tables]).view(x.shape[:-1])
