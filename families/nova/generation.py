"""Drawing with NOVA: frame after frame, its tokens in groups, each group by a diffusion of its own.

A frame begins with all tokens hidden. The image encoder gives a condition for each, the diffusion head draws some of
them, and the encoder reads these before the next group (arXiv:2412.14169, section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from families.nova.guidance import TokenGuidance
from families.nova.masks import group_sizes
from modules.nova import NOVATransformer
from modules.nova_decoder import unpatchify
from modules.nova_encoders import ClipState
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.samplers import DDIMSampler, DDPMSampler
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.times import Steps, flow_times, sampling_times
from warpcore.random import SampleRandom


class Draws(Protocol):
    """The random numbers of a drawing of B clips."""

    def order(self, tokens: int) -> Tensor:
        """(B, N) numbers: tokens are drawn from the smallest on, in every frame."""

    def noise(self, frame: int, group: int, shape: tuple[int, int]) -> Tensor:
        """(B, N, P) normal numbers, with which a group of tokens begins."""

    def step_noise(self, frame: int, group: int, step: int, shape: tuple[int, int]) -> Tensor:
        """(B, N, P) normal numbers of a step of its diffusion."""


class SeededDraws:
    """Those that seeds stand for: the same seed, the same numbers, in any batch."""

    def __init__(self, random: SampleRandom):
        self.random = random

    def order(self, tokens: int) -> Tensor:
        return self.random.normal("token order", tokens)

    def noise(self, frame: int, group: int, shape: tuple[int, int]) -> Tensor:
        return self.random.normal(f"noise of frame {frame}, group {group}", *shape)

    def step_noise(self, frame: int, group: int, step: int, shape: tuple[int, int]) -> Tensor:
        return self.random.normal(f"noise of frame {frame}, group {group}, step {step}", *shape)


@dataclass(frozen=True)
class Drawing:
    """How frames are drawn. The defaults are the published ones."""

    groups: int = 64
    """Into which the tokens of a frame are parted; those that would be empty are left out."""
    steps: int = 25
    """Of the diffusion of each group; 100 where it is not a flow."""
    guidance: TokenGuidance = field(default_factory=TokenGuidance)
    flow_shift: float | None = None
    """Of the times of a flow, in place of the process's own. The list of times it is applied to keeps that."""


@torch.no_grad()
def draw_frames(
    network: NOVATransformer,
    diffusion: GDF,
    drawing: Drawing,
    draws: Draws,
    frames: int,
    condition: Tensor,
    unconditional: Tensor | None = None,
    first: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield scaled latents (B, C, H, W) of each frame.

    Args:
        condition, unconditional: tokens (B, L, D), see `NOVATransformer.condition`; the second for guidance, with the
            empty text or that of a negative prompt.
        first: latents (B, C, H, W) of the first frame, which then is not drawn: picture to video.

    Raises ValueError for guidance without `unconditional`, and for steps that the process has not.
    """
    guidance, samples = drawing.guidance, len(condition)
    tokens = guidance.conditions(condition, unconditional)
    unseen = guidance.unseen(samples, condition.device)
    clip, previous = ClipState(frames), None
    in_frame = network.image_base_size[0] * network.image_base_size[1]
    order = draws.order(in_frame).argsort(dim=1)
    for frame in range(frames):
        seen = None if previous is None else previous.repeat(guidance.passes, 1, 1, 1)
        told = network.encode_frame(seen, tokens, clip, unseen)
        if frame == 0 and first is not None:
            previous = first
        else:
            previous = _frame(network, diffusion, drawing, draws, frame, told, order)
        yield previous


def _frame(
    network: NOVATransformer,
    diffusion: GDF,
    drawing: Drawing,
    draws: Draws,
    frame: int,
    told: Tensor,
    order: Tensor,
) -> Tensor:
    """Latents (B, C, H, W) of what stands for a frame (passes B, M, D), with the order (B, N) of its tokens."""
    passes, in_frame = drawing.guidance.passes, order.shape[1]
    numbers = network.image_decoder.head.out_features
    x = told.new_zeros(len(order), in_frame, numbers, dtype=torch.float32)
    hidden = torch.ones_like(order, dtype=torch.bool)
    sizes = [size for size in group_sizes(in_frame, drawing.groups) if size]
    groups = order.split(sizes, dim=1)
    for group, chosen in enumerate(groups):
        latents = unpatchify(x, network.image_base_size, network.patch)
        visible = torch.cat([order[:, :0], *groups[:group]], dim=1)
        rows = (one.repeat(passes, *[1] * (one.dim() - 1)) for one in (latents, hidden, visible))
        z = network.encode_picture(*rows, told)
        scale = drawing.guidance.scale_of(group, len(groups))
        found = _group(network, diffusion, drawing, draws, (frame, group), z, chosen, scale)
        places = _places(chosen, numbers)
        x = x.scatter(1, places, found.gather(1, places))
        hidden = hidden.scatter(1, chosen, False)
    return unpatchify(x, network.image_base_size, network.patch)


def _group(
    network: NOVATransformer,
    diffusion: GDF,
    drawing: Drawing,
    draws: Draws,
    where: tuple[int, int],
    z: Tensor,
    chosen: Tensor,
    scale: float,
) -> Tensor:
    """Tokens (B, N, P) of which the chosen ones (B, K) are drawn by their conditions z (passes B, N, D)."""
    guidance, samples = drawing.guidance, len(chosen)
    sampler, steps = _steps(diffusion, drawing)
    x = draws.noise(*where, (z.shape[1], network.image_decoder.head.out_features))
    z = z.gather(1, _places(chosen.repeat(guidance.passes, 1), z.shape[2]))
    places = _places(chosen, x.shape[2])
    logsnrs, _ = steps.along(diffusion.schedule, torch.float32)
    guided = iter((diffusion.noise_cond(logsnrs[:-1]) >= guidance.until).tolist())

    def predict(x: Tensor, t: Tensor) -> Tensor:
        """Of tokens that are not chosen, published programs take what they are; norms count them."""
        passes = guidance.passes if next(guided) else 1
        picked = x.gather(1, places).repeat(passes, 1, 1)
        made = network.denoise(picked, t.repeat(passes), z[: passes * samples])
        everywhere = x.repeat(passes, 1, 1).scatter(1, places.repeat(passes, 1, 1), made.to(x.dtype))
        return guidance.combined(everywhere, scale) if passes > 1 else everywhere

    noise = partial(draws.step_noise, *where, shape=tuple(x.shape[1:]))
    for _, reached, _ in diffusion.sample(predict, {}, x, sampler=sampler, steps=steps, noise=noise):
        x = reached
    return x


def _steps(diffusion: GDF, drawing: Drawing) -> tuple[DDIMSampler, Steps]:
    """The published sampler and its times: ancestral for discrete timesteps, Euler's method for a flow."""
    schedule = diffusion.schedule
    if isinstance(schedule, TableSchedule):
        return DDPMSampler(diffusion.input_scaler), Steps(times=sampling_times(schedule, drawing.steps, "ddpm"))
    times = flow_times(drawing.steps, shift=schedule.shift)
    more = 1.0 if drawing.flow_shift is None else drawing.flow_shift / schedule.shift
    return DDIMSampler(diffusion.input_scaler), Steps(times=times, shift=more)


def _places(chosen: Tensor, numbers: int) -> Tensor:
    """(B, K, P): where the numbers of chosen tokens (B, K) are."""
    return chosen[:, :, None].expand(-1, -1, numbers)
