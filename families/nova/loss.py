"""NOVA's training loss: hidden tokens are noised and found again, each at a time of its own (arXiv:2412.14169)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from families.nova.masks import mask_ratio, split_tokens, visible_tokens
from modules.nova_decoder import patchify
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.tables import TableSchedule
from warpcore.random import SampleRandom

STEPS = 1000
"""Of the discrete times that published networks are trained at."""
LOSS_REPEAT = 4
"""Draws of noise and times for each token."""

Process = Literal["flow", "ddpm"]


def process(kind: Process, shift: float = 1.0, loss_weight: str = "constant", **settings) -> GDF:
    """The diffusion process of the networks of 1,024 px (`flow`), or of those of 512 px and of videos (`ddpm`).

    Args:
        shift: of a flow.
        settings: see `flow_process` and `discrete_process`.
    """
    if kind == "flow":
        return flow_process(loss_weight, steps=STEPS, shift=shift, logit_normal=True, **settings)
    made = discrete_process("cosine", "epsilon", loss_weight, steps=STEPS, **settings)
    made.schedule.steps_offset = 1  # as their scheduler_config.json says
    return made


@dataclass
class TokenDraws:
    """The random numbers of a micro-batch: B clips of T frames, R draws for each token."""

    hidden: Tensor
    """(B T, N) bool."""
    visible: Tensor
    """(B T, K): the numbers of the other tokens."""
    noise: Tensor
    """(R B T, N, P) normal numbers."""
    t: Tensor
    """(R B T, N) times of the schedule: shares of the noise, or timesteps."""
    shift: float = 1.0
    """Of the schedule, beside its own."""

    @classmethod
    def of(cls, random: SampleRandom, diffusion: GDF, frames: int, tokens: int, numbers: int, repeats: int):
        """Draws for clips of `frames` frames of `tokens` tokens of `numbers` numbers. The share of hidden tokens is
        that of the first sample; at a level that is given, which all tokens have, it is the median."""
        level = random.level
        ratio = mask_ratio(random.on_cpu.uniform("mask ratio")[0].item() if level is None else 0.5)
        order = random.normal("token order", frames, tokens).flatten(0, 1)
        hidden, visible = split_tokens(order, visible_tokens(ratio, tokens))
        noise = random.normal("noise", repeats, frames, tokens, numbers)
        times = random.normal("timestep", repeats, frames, tokens)
        noise, times = (draws.transpose(0, 1).flatten(0, 2) for draws in (noise, times))
        if level is not None:
            t = diffusion.schedule.t_at(torch.full_like(times, level))
            return cls(hidden, visible, noise, t, shift=1 / diffusion.schedule.shift)
        return cls(hidden, visible, noise, token_times(diffusion, times))


def token_times(diffusion: GDF, normal: Tensor) -> Tensor:
    """Times of the schedule by normal draws of any shape: of a flow, shares of the noise in thousandths, more of
    medium ones (arXiv:2403.03206, eq. 19); else timesteps, all alike."""
    if isinstance(diffusion.schedule, TableSchedule):
        return diffusion.schedule.training_t(torch.special.ndtr(normal))
    clean = (normal.sigmoid() * STEPS).long().clamp(max=STEPS - 1)
    return (STEPS - clean) / STEPS


@dataclass
class TokenLosses:
    """The losses of frames (B, T): means over hidden tokens and draws."""

    loss: Tensor
    raw: Tensor
    """Before weighting."""

    def of_samples(self, frames: Tensor, first: bool = True) -> Tensor:
        """(B,) of the losses (B, T) of frames: that of the first one, plus the mean of the others.

        first: without it, the first frame is not learned, which then is to be given.
        """
        if frames.shape[1] == 1:
            return frames[:, 0]
        later = frames[:, 1:].mean(dim=1)
        return frames[:, 0] + later if first else later


def token_losses(
    network: nn.Module, diffusion: GDF, latents: Tensor, draws: TokenDraws, condition: Mapping[str, Tensor | None]
) -> TokenLosses:
    """The losses of predicting hidden tokens of scaled latents (B, C, T, H, W) with a `NOVATransformer`.

    condition: see `NOVATransformer.condition`.
    """
    (samples, _, frames), patch = latents.shape[:3], network.patch
    patches = patchify(latents.transpose(1, 2).flatten(0, 1), patch)
    repeats = len(draws.noise) // len(patches)
    x0 = patches.repeat(repeats, 1, 1)
    # To diffusion, every token is a sample.
    diffused = diffusion.diffuse(x0.flatten(0, 1), draws.noise.flatten(0, 1), t=draws.t.flatten(), shift=draws.shift)
    noised, times = diffused.noised.view_as(x0), diffused.noise_cond.view(x0.shape[:2])
    prediction = network(latents, draws.hidden, draws.visible, noised, times, **condition)
    found = diffusion.loss(diffused, prediction.flatten(0, 1))

    def of_frames(losses: Tensor) -> Tensor:
        by_token = losses.view(repeats, *draws.hidden.shape).mean(dim=0) * draws.hidden
        return (by_token.sum(dim=1) / draws.hidden.sum(dim=1)).view(samples, frames)

    return TokenLosses(of_frames(found.loss), of_frames(found.raw))
