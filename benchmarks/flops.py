"""FLOPs of an update, by formula.

Those of matrix products, convolutions and attention count, a multiplication and an addition as two. For one sample,
with N positions and L condition tokens in a level of C channels:

    convolution block     N (2 k^2 C + 8 C (2 C + C_skip))
    feed-forward block    16 N C^2
    timestep block        4 c_r C for each time condition
    attention block       4 N C^2 + 4 (N + L) C^2 + 4 N (N + L) C + 2 L D C
    repeat mapper         2 N C^2

and what maps inputs, outputs, conditions and levels to each other. The backward pass takes twice as much as the
forward pass, once as much where weights are frozen. What checkpointing computes again does not count, nor does a
ControlNet's own backbone (2% of an update of the 3.6B): utilisation is of useful work.
"""

import torch
from torch import nn

from modules.blocks import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock
from modules.stage_c import StageC
from modules.unet import UNet

TEXT_TOKENS = 77
DENSE_BFLOAT16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Peaks of matrix products without sparsity, from the data sheets (H100: SXM). Large products reach 80% of it."""


def dense_peak(device: torch.device) -> float | None:
    """TFLOP/s that the card could do in bfloat16; None for a CPU or a card that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in DENSE_BFLOAT16_TFLOPS.items() if card in name), None)


def forward_flops(network: UNet, positions: int, text_tokens: int = TEXT_TOKENS) -> int:
    """FLOPs of the forward pass of one sample, by the formula above. positions: side of the latents."""
    tokens = network.c_clip_seq + (text_tokens + network.c_clip_seq if isinstance(network, StageC) else 0)
    sides = [positions // network.patch_size]
    for scaler in network.down_downscalers[1:]:
        sides.append(sides[-1] // 2 if _halves(scaler[1]) else sides[-1])
    levels = len(sides)
    total = _pointwise(network.embedding[1], sides[0] ** 2) + _pointwise(network.clf[1], sides[0] ** 2)
    if isinstance(network, StageC):
        total += _pointwise(network.clip_txt_mapper, text_tokens)
        total += sum(_pointwise(m, 1) for m in (network.clip_txt_pooled_mapper, network.clip_img_mapper))
    else:
        total += _pointwise(network.clip_mapper, 1)
        total += sum(_pointwise(network.effnet_mapper[i], sides[0] ** 2) for i in (0, 2))
    ways = (network.down_blocks, network.down_repeat_mappers, range(levels)), (
        network.up_blocks, network.up_repeat_mappers, reversed(range(levels)))  # fmt: skip
    for blocks, mappers, order in ways:
        for level, repeats, number in zip(blocks, mappers, order, strict=True):
            n = sides[number] ** 2
            total += (1 + len(repeats)) * sum(_block(block, n, tokens) for block in level)
            total += sum(_pointwise(mapper, n) for mapper in repeats)
    for number in range(1, levels):
        for scaler in (network.down_downscalers[number][1], network.up_upscalers[levels - 1 - number][1]):
            layers = [m for m in scaler.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
            # Stage C maps at the finer level; each of Stage B's kernels belongs to one position of the coarser.
            n = sides[number - 1] ** 2 if isinstance(network, StageC) else sides[number] ** 2
            total += sum(2 * n * layer.weight.numel() for layer in layers)
    return total


def _halves(scaler: nn.Module) -> bool:
    """Whether the layer between two levels changes the size."""
    return isinstance(scaler, nn.Conv2d) or not isinstance(scaler.blocks[1], nn.Identity)


def _pointwise(layer: nn.Module, n: int) -> int:
    return 2 * n * layer.weight.numel()


def _block(block: nn.Module, n: int, tokens: int) -> int:
    match block:
        case ResBlock() | FeedForwardBlock():
            wide = _pointwise(block.channelwise[0], n) + _pointwise(block.channelwise[4], n)
            return wide + (_pointwise(block.depthwise, n) if isinstance(block, ResBlock) else 0)
        case TimestepBlock():
            return sum(_pointwise(getattr(block, name), 1) for name in block.names)
        case AttnBlock():
            c = block.attention.attn.out_proj.in_features
            memory = tokens + (n if block.self_attn else 0)
            return 4 * n * c * c + 4 * memory * c * c + 4 * n * memory * c + _pointwise(block.kv_mapper[1], tokens)
    raise TypeError(type(block).__name__)
