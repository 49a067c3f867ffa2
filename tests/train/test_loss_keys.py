"""Keys that weigh what a training learns do so: a wrong weight would only be seen in what a run becomes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families.common.reconstruction_losses import ReconstructionTraining
from modules.effnet import normalise_images
from tests.train.test_every_script import settings as settings
from tests.train.test_every_script import use_case
from warpcore.config import make_config
from warpcore.core import WarpCore
from warpcore.random import SampleRandom
from warpcore.rehearsal import made_up_batch
from warpcore.results import Losses

SIZE = (64, 64)


def built(name: str, settings: dict) -> WarpCore:
    """A run of a script with its networks, as they are before the first update."""
    run = use_case(name)(make_config(use_case(name).Config, settings))
    run.make_networks()
    return run


def losses(run: WarpCore, **keys) -> Losses:
    """Those of two random pictures, with other values of keys that `loss` reads."""
    kept, run.config = run.config, run.config.model_copy(update=keys)
    batch = made_up_batch(run, SIZE, 2)
    batch.images = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(0)).byte()
    found = run.loss(*run.encoded(batch))
    run.config = kept
    return found


def check_weight(run: WarpCore, key: str, term: Tensor | None = None) -> None:
    """The key weighs one term of the loss (B,)."""
    none, one, two = (losses(run, **{key: weight}).loss for weight in (0.0, 1.0, 2.0))
    assert ((one - none).abs() > 1e-6).all(), key
    torch.testing.assert_close(two - none, 2 * (one - none), rtol=1e-4, atol=1e-6)
    if term is not None:
        torch.testing.assert_close(one - none, term, rtol=1e-4, atol=1e-6)


def test_the_weights_and_the_noise_of_the_encoder_s_loss(settings):
    run = built("train_encoder", settings("train_encoder", "run"))
    batch = made_up_batch(run, SIZE, 2)
    pictures = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(0)).byte() / 255

    def error(noise: float) -> Tensor:
        latents = run.networks["encoder"](normalise_images(pictures))
        drawn = SampleRandom(batch.seeds).normal("latent noise", *latents.shape[1:])
        rebuilt = run.networks["previewer"](latents + noise * drawn)
        return rebuilt - F.interpolate(pictures, rebuilt.shape[2:], mode="area")

    plain = {"latent_noise": 0.0, "squared_weight": 0.0, "coarse_weight": 0.0, "edge_weight": 0.0}
    for noise in (0.0, 0.1, 1.0):
        expected = error(noise).abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(losses(run, **plain | {"latent_noise": noise}).loss, expected)
    wrong = error(run.config.latent_noise)
    coarse = sum(F.avg_pool2d(wrong, side).square().mean(dim=(1, 2, 3)) for side in (2, 4, 8))
    down, right = wrong[:, :, 1:] - wrong[:, :, :-1], wrong[..., 1:] - wrong[..., :-1]
    check_weight(run, "coarse_weight", coarse)
    check_weight(run, "edge_weight", down.abs().mean(dim=(1, 2, 3)) + right.abs().mean(dim=(1, 2, 3)))
    check_weight(run, "squared_weight", wrong.square().mean(dim=(1, 2, 3)))


def test_the_weights_of_stage_a_s_loss(settings):
    run = built("train_a", settings("train_a", "run", codebook_decay=0.75, discriminator_start=10))
    check_weight(run, "commitment_weight")
    assert run.codebook.decay == 0.75


def test_without_a_weight_there_is_no_discriminator(settings):
    run = built("train_a", settings("train_a", "run", discriminator_weight=0.0, discriminator_start=0))
    assert "discriminator" not in run.networks
    assert "discriminator_loss" not in losses(run).metrics


def test_the_discriminator_s_gradient_has_its_share_of_the_other_losses(settings):
    run = built("train_vae", settings("train_vae", "run", discriminator_start=0))
    pictures = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))

    def gradient(weight: float) -> Tensor:
        run.config = run.config.model_copy(update={"discriminator_weight": weight})
        rebuilt = (pictures * 0.5).requires_grad_()
        loss = (rebuilt - pictures).square().mean(dim=(1, 2, 3))
        return torch.autograd.grad(run.with_discriminator(loss, rebuilt, pictures)[0].sum(), rebuilt)[0]

    plain = gradient(0.0)
    for weight in (0.1, 0.5):
        share = (gradient(weight) - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        torch.testing.assert_close(share, torch.full((2,), weight), rtol=1e-3, atol=1e-4)


def test_the_perceptual_distance_has_its_weight():
    config = SimpleNamespace(squared_weight=0.0, means_weight=0.0, perceptual_weight=3.0)
    distance = torch.tensor([0.5, 2.0])
    run = SimpleNamespace(config=config, networks={"perceptual": lambda rebuilt, pictures: distance})
    pictures = torch.rand(2, 3, 8, 8)
    loss, _ = ReconstructionTraining.reconstruction_loss(run, pictures, pictures)
    torch.testing.assert_close(loss, 3 * distance)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_stage_b_does_not_see_the_encoder_s_latents_of_a_share_of_the_samples(settings, monkeypatch, dropout):
    run = built("train_b", settings("train_b", "run", caption_dropout=0.0))
    seen = []
    monkeypatch.setattr(
        run.networks["generator"], "forward", lambda noised, _, effnet, clip: seen.append(effnet) or noised
    )
    losses(run, effnet_dropout=dropout)
    shown = SampleRandom([0, 1]).uniform("effnet dropout") >= dropout
    assert (seen[0].abs().amax(dim=(1, 2, 3)) > 0).tolist() == shown.tolist()


@pytest.mark.parametrize("name", ["train_b", "train_c", "train_c_controlnet", "train_sd"])
def test_sample_images_are_guided_as_the_config_says(settings, monkeypatch, name):
    run = built(name, settings(name, "run", sample_guidance=3.5, sample_steps=7, sample_sampler="ddim"))
    given = []

    def draw(diffusion, network, conditions, unconditional, shape, seeds, **sampling):
        given.append((conditions, unconditional, sampling))
        return torch.zeros(len(seeds), *shape)

    for module in ("train.train_b", "train.train_c", "families.stable_diffusion.training"):
        monkeypatch.setattr(f"{module}.draw_latents", draw)
    for guides in (False, True) if name == "train_c_controlnet" else (False,):
        if name == "train_c_controlnet":
            run.config = run.config.model_copy(update={"sample_guides_control": guides})
            monkeypatch.setattr(run.networks["controlnet"], "forward", lambda _: [torch.ones(1), None])
        with torch.no_grad():
            run.sample(made_up_batch(run, SIZE, 2))
        conditions, unconditional, sampling = given[-1]
        assert (sampling["guidance"], sampling["steps"], sampling["sampler"]) == (3.5, 7, "ddim")
        if name == "train_c_controlnet":
            assert conditions["cnet"] == [torch.ones(1), None]
            assert unconditional["cnet"] == [torch.zeros(1) if guides else torch.ones(1), None]
