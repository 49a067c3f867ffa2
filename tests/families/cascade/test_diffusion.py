"""Latent sizes, and drawing that depends on seeds alone."""

import torch
from torch import nn

from families.cascade.diffusion import make_diffusion
from families.common.sampling import draw_latents, latent_size
from tests.golden import load_case
from warpcore.random import SampleRandom


def test_latents_have_the_sizes_of_the_reference():
    rows = load_case("latent_sizes")[0]["rows"]
    assert len(rows) > 5
    for row in rows:
        for stage, factor, default in (("c", "compression_factor_b", 42.67), ("b", "compression_factor_a", 4)):
            size = latent_size(row["height"], row["width"], row.get(factor, default))
            assert list(size) == row[f"stage_{stage}_shape"][2:], row
    assert latent_size(1000, 1001, 4, patch_size=2) == (250, 252)


class Echo(nn.Module):
    """Predicts its input plus its condition."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, r, shift):
        return self.weight * x + shift[:, None, None, None]


def test_a_seed_draws_the_same_latents_in_any_batch_with_any_sampler():
    diffusion, network = make_diffusion(), Echo()
    shift = torch.tensor([0.1, 0.2, 0.3])
    for sampler in ("ddpm", "ddim", "lcm", "dpmpp_2m"):
        settings = {"steps": 4, "guidance": 2.0, "sampler": sampler}
        together = draw_latents(
            diffusion, network, {"shift": shift}, {"shift": shift * 0}, (2, 3, 3), [5, 6, 7], **settings
        )
        alone = draw_latents(
            diffusion, network, {"shift": shift[1:2]}, {"shift": torch.zeros(1)}, (2, 3, 3), [6], **settings
        )
        torch.testing.assert_close(together[1:2], alone)
        assert not torch.allclose(together[0], together[1])


def test_drawing_from_latents_begins_at_their_noise_level_with_its_share_of_the_steps():
    diffusion, network, seen = make_diffusion(), Echo(), []
    network.register_forward_pre_hook(lambda _, args: seen.append(args))
    start, shift = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)), 1.7
    conditions = {"shift": torch.zeros(1)}
    for level in (0.3, 1.0):
        seen.clear()
        settings = {"steps": 10, "guidance": None, "shift": shift}
        draw_latents(diffusion, network, conditions, None, (2, 3, 3), [5], start=start, noise_level=level, **settings)
        assert len(seen) == 10 * level
        x, r = seen[0]
        logsnr = diffusion.schedule(torch.tensor([level]), shift=shift)
        torch.testing.assert_close(r, diffusion.noise_cond(logsnr))
        noise = (x - logsnr.sigmoid().sqrt() * start) / (-logsnr).sigmoid().sqrt()
        torch.testing.assert_close(noise, SampleRandom([5]).normal("initial noise", 2, 3, 3), rtol=0, atol=1e-5)
