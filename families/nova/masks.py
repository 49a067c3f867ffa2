"""Which tokens of a frame are hidden: in training, and group by group where a frame is drawn."""

import math
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

LEAST_RATIO = 0.7
"""Of hidden tokens in training."""
RATIOS = NormalDist(mu=1.0, sigma=0.25)
"""Of the share of hidden tokens, cut to what lies between `LEAST_RATIO` and 1."""


def mask_ratio(uniform: float) -> float:
    """The share of hidden tokens that a uniform draw stands for: one for all pictures of a micro-batch, so that they
    have as many visible tokens. The most likely one is 1 (all hidden)."""
    low, high = RATIOS.cdf(LEAST_RATIO), RATIOS.cdf(1.0)
    return min(max(RATIOS.inv_cdf(low + uniform * (high - low)), LEAST_RATIO), 1.0)


def visible_tokens(ratio: float, tokens: int) -> int:
    """How many of a frame's tokens are visible; halves are rounded to even numbers."""
    return round((1 - ratio) * tokens)


def split_tokens(uniform: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Hidden tokens (B, N) bool, and the numbers (B, K) of the visible ones, by uniform draws (B, N): the visible ones
    are those with the smallest draws."""
    chosen = uniform.argsort(dim=1)[:, :visible]
    return torch.ones_like(uniform, dtype=torch.bool).scatter(1, chosen, False), chosen


def group_sizes(tokens: int, steps: int) -> list[int]:
    """How many tokens each step of drawing a frame adds: few first, as a cosine falls (arXiv:2202.04200, eq. 2).

    Where there are many steps, some add none.
    """
    left = [round(math.cos(math.pi / 2 * step / steps) * tokens) for step in range(steps + 1)]
    return [before - after for before, after in pairwise(left)]
