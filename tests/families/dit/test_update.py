"""One update is that of the published training written in plain PyTorch, with diffusers' autoencoder."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from families.common.autoencoders import Autoencoder
from families.common.class_training import CLASS
from modules.dit import DiT
from tests.families.dit.classed import CLASSES, SMALL, numbered, random_network, small_settings, write_classed
from tests.warpcore.runs import read_metrics
from train.train_dit import TrainDit
from warpcore.config import make_config

pytestmark = pytest.mark.integration
LR, EPS, BETAS = 0.01, 1e-2, (0.9, 0.999)
"""`EPS` keeps gradients of rounding size from steps of full size."""


class Recorded(TrainDit):
    """Keeps what is drawn by chance: dropped classes, latents, timesteps and noise."""

    def encode(self, batch, random):
        self.batch, self.random = batch, random
        return super().encode(batch, random)


def mean(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).mean(dim=1)


def bound(x0, noised, noise_found, v, t, betas) -> torch.Tensor:
    """(B,) bits, as Improved DDPM and DiT compute it (arXiv:2102.09672), for t above 0."""
    alphas = (1 - betas).cumprod(0)
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)

    def at(table):
        return table[t].float().view(-1, 1, 1, 1)

    def posterior_mean(x):
        return (
            at(betas * before.sqrt() / (1 - alphas)) * x
            + at((1 - before) * (1 - betas).sqrt() / (1 - alphas)) * noised
        )

    found = (noised - at((1 - alphas).sqrt()) * noise_found) / at(alphas.sqrt())
    share = (v + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(variance.log())
    true = at(variance.log())
    wrong = (posterior_mean(x0) - posterior_mean(found)) ** 2
    nats = 0.5 * (-1 + log_variance - true + (true - log_variance).exp() + wrong * (-log_variance).exp())
    return mean(nats / math.log(2))


def in_plain_pytorch(weights: Path, run: Recorded) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights after an update by the published formulas."""
    network = DiT(2, num_classes=CLASSES, **SMALL)
    network.load_state_dict(load_file(weights))
    vae = Autoencoder.load(Path(run.config.version.autoencoder)).model
    random, labels = run.random, run.batch.extra[CLASS]
    with torch.no_grad():
        posterior = vae.encode(run.batch.images / 127.5 - 1).latent_dist
        x0 = posterior.mean + posterior.std * random.normal("latent", *posterior.mean.shape[1:])
        x0 = x0 * vae.config.scaling_factor
    dropped = random.uniform("class dropout") < run.config.class_dropout
    assert dropped.any()
    assert not dropped.all()
    labels = torch.where(dropped, CLASSES, labels)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = (random.uniform("timestep") * 1000).long()
    noise = random.normal("noise", *x0.shape[1:])
    alphas = (1 - betas).cumprod(0)[t].float().view(-1, 1, 1, 1)
    noised = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
    made, v = network(noised, t, labels).chunk(2, dim=1)
    loss = mean(F.mse_loss(made, noise, reduction="none")) + bound(x0, noised, made.detach(), v, t, betas)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0)
    loss.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.mean().item(), norm.item(), network.state_dict()


def test_an_update_is_that_of_the_published_training(small_mini, tmp_path):
    weights = tmp_path / "start.safetensors"
    save_file(random_network().state_dict(), weights)
    data = write_classed(tmp_path / "a.tar", numbered(4))
    settings = small_settings(
        tmp_path, data, generator_checkpoint_path=str(weights), updates=1, save_every=1, class_dropout=0.5, lr=LR,
        eps=EPS, betas=BETAS, weight_decay=0,
    )  # fmt: skip
    run = Recorded(make_config(Recorded.Config, settings))
    assert run.run() == 0
    loss, norm, expected = in_plain_pytorch(weights, run)
    (line,) = read_metrics(settings)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)  # the published tables are float32
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    trained = load_file(tmp_path / "runs" / "run" / "generator.safetensors")
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=2e-5)


def test_without_a_learned_variance_the_loss_is_the_squared_error(small_mini, tmp_path):
    data = write_classed(tmp_path / "a.tar", numbered(4))
    settings = small_settings(tmp_path, data, learn_sigma=False, updates=1, save_every=1)
    assert TrainDit(make_config(TrainDit.Config, settings)).run() == 0
    (line,) = read_metrics(settings)
    assert line["loss"] == line["raw_loss"]
    trained = load_file(tmp_path / "runs" / "run" / "generator.safetensors")
    assert trained["final_layer.linear.weight"].shape == (16, 32)
