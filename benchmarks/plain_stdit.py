"""Updates of Open-Sora's networks as its program writes them, without fused attention, for `plain_loops.py`."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.common.features import lengths_name, stored
from families.common.t5 import padded, token_mask
from families.common.training import DiffusionTraining
from modules.stdit import STDiT
from modules.stdit_parts import CrossAttention, NormedAttention, rotate
from warpcore.data.reader import Batch
from warpcore.diffusion.schedules import shift_by_size


class PlainAttention(nn.Module):
    """Self-attention with its scores written out, and their softmax in float32."""

    def __init__(self, own: NormedAttention):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, rotation: Tensor | None = None, shards: None = None) -> Tensor:
        own = self.own
        q, k, v = own.qkv(x).view(*x.shape[:2], 3, own.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None and own.rotate_first:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = own.q_norm(q), own.k_norm(k)
        if rotation is not None and not own.rotate_first:
            q, k = rotate(q, rotation), rotate(k, rotation)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        found = scores.float().softmax(dim=-1).to(v.dtype) @ v
        return own.proj(found.transpose(1, 2).reshape(x.shape))


class PlainCrossAttention(nn.Module):
    """Attention of each sample to those tokens of its text that its mask leaves."""

    def __init__(self, own: CrossAttention):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        heads = self.own.num_heads
        q = self.own.q_linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        found = []
        for one, text, seen in zip(q, y, mask, strict=True):
            k, v = self.own.kv_linear(text[seen]).view(-1, 2, heads, one.shape[-1]).permute(1, 2, 0, 3).unbind(0)
            scores = (one * one.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            found.append(scores.float().softmax(dim=-1).to(v.dtype) @ v)
        return self.own.proj(torch.stack(found).transpose(1, 2).reshape(x.shape))


def plain_stdit(run: DiffusionTraining, batch: Batch) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A copy of the network with plain attention, and what predicts with it: latents and times to both halves."""
    network = copy.deepcopy(run.networks["generator"])
    for block in network.blocks:
        block.attn, block.cross_attn = PlainAttention(block.attn), PlainCrossAttention(block.cross_attn)
        if hasattr(block, "attn_temp"):
            block.attn_temp = PlainAttention(block.attn_temp)
    length = run.config.version.text_length
    text, mask = padded(stored(batch, "text"), length), token_mask(stored(batch, lengths_name("text")), length)
    told = {"mask": mask}
    if run.config.version.kind is not STDiT:
        height, width = (torch.full((len(text),), float(side), device=run.device) for side in batch.size[1:])
        told |= {"fps": torch.full_like(height, 24), "height": height, "width": width}
    return network, lambda noised, times: network(noised, times, text, **told)


def stdit_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The published loss of 1.2: a straight flow, logit-normal times shifted by size, half of the channels."""
    network, predict = plain_stdit(run, batch)
    scale, moments = run.latents[0], stored(batch, "moments")
    height, width = (torch.full((len(moments),), float(side), device=run.device) for side in batch.size[1:])

    def loss() -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = scale.apply(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        noise, t = torch.randn_like(latents), torch.randn(len(latents), device=run.device).sigmoid()
        shift = shift_by_size(height, width, torch.full_like(height, latents.shape[2]))
        t = shift * t / (1 + (shift - 1) * t)
        share = t.view(-1, 1, 1, 1, 1)
        found = predict((1 - share) * latents + share * noise, 1000 * t)[:, : latents.shape[1]]
        return F.mse_loss(found.float(), latents - noise)

    return network, loss
