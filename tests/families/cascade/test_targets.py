"""Every target that a config can name draws what it was told, when the network predicts it perfectly."""

import pytest
import torch
from torch import nn

from families.cascade.diffusion import make_diffusion
from families.common.sampling import draw_latents
from warpcore.diffusion.targets import TARGETS


class Perfect(nn.Module):
    """Knows the clean latents, and so predicts any target of them."""

    def __init__(self, diffusion, x0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.diffusion, self.x0 = diffusion, x0

    def forward(self, x, r, **conditions):
        # The noise condition is a monotonic function of the noise: look up which logSNR it stands for.
        t = torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
        logsnr = self.diffusion.schedule(t)
        known = self.diffusion.noise_cond(logsnr)
        nearest = logsnr[(known[None] - r[:, None].double()).abs().argmin(dim=1)].float()
        a, b = self.diffusion.input_scaler.weights(nearest, x)
        return self.diffusion.target(self.x0, (x - a * self.x0) / b, nearest, a, b)


@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_network_draws_its_latents(target):
    torch.manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4)
    diffusion = make_diffusion(target)
    network = Perfect(diffusion, x0)
    for sampler in ("ddim", "dpmpp_2m"):
        drawn = draw_latents(diffusion, network, {}, None, (3, 4, 4), [1, 2], steps=30, guidance=None, sampler=sampler)
        torch.testing.assert_close(drawn, x0, rtol=0, atol=0.05)
