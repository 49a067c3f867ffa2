"""Latent sizes, and drawing that depends on seeds alone."""

import torch
from torch import nn

from cascade.diffusion import draw_latents, make_diffusion, stage_c_latent_size
from tests.golden import load_case


def test_latents_have_the_sizes_of_the_reference():
    rows = load_case("latent_sizes")[0]["rows"]
    assert len(rows) > 5
    for row in rows:
        size = stage_c_latent_size(row["height"], row["width"], row.get("compression_factor_b", 42.67))
        assert list(size) == row["stage_c_shape"][2:], row


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
