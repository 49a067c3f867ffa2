"""The losses and the noise that every training script knows, against their published formulas in plain PyTorch."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from families.cascade.config import StageCConfig
from families.common.losses import with_loss
from families.common.training import DiffusionTraining
from families.stable_diffusion.config import SdConfig
from warpcore.config import ConfigError, make_config
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.errors import UserError
from warpcore.random import SampleRandom

GIVEN = {"experiment_id": "a", "checkpoint_path": "runs", "updates": 1, "batch_size": 3, "webdataset_path": "a.tar"}
RANDOM = SampleRandom([1, 2, 3])
LATENTS = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def measure(target="epsilon", mask=None, zero_terminal_snr=False, random=RANDOM, own_shift=1.0, **settings):
    """What the network sees and the losses, and the noise and the timesteps that they have to follow from."""
    config = make_config(SdConfig, GIVEN | settings)
    given = {"offset_noise": config.offset_noise}
    if target == "rectified_flows":
        process = flow_process(shift=own_shift, **given)
    else:
        process = discrete_process("scaled_linear", target, zero_terminal_snr=zero_terminal_snr, **given)
    run = SimpleNamespace(
        config=config, diffusion=with_loss(process, config, target), mask=mask,
        sample_weight=torch.tensor([1.0, 2, 3]),
        around_forward=lambda random: nullcontext(), with_further_losses=lambda losses: losses,
    )  # fmt: skip
    seen = {}

    def predict(noised, timestep):
        seen.update(noised=noised, timestep=timestep)
        return noised * 0.5

    losses = DiffusionTraining.denoising_loss(run, LATENTS, random, predict)
    return seen, losses


def noised(timestep, noise):
    alpha = ALPHAS[timestep.long()].float().view(-1, 1, 1, 1)
    return alpha.sqrt() * LATENTS + (1 - alpha).sqrt() * noise


def mean(values):
    return values.flatten(1).mean(dim=1)


NOISE = RANDOM.normal("noise", 4, 8, 16)
IMPORTANCE = torch.tensor([1.0, 2, 3])


def test_the_error_of_published_settings_is_squared_and_nothing_else():
    seen, losses = measure()
    x = noised(seen["timestep"], NOISE)
    torch.testing.assert_close(seen["noised"], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.raw, mean((x * 0.5 - NOISE) ** 2))
    torch.testing.assert_close(losses.loss, losses.raw * IMPORTANCE)


@pytest.mark.parametrize("schedule", ["constant", "snr"])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_and_smooth_l1_follow_their_formulas_and_leave_the_raw_loss(kind, schedule):
    mask = torch.ones(3, 1, 8, 16)
    mask[..., :4] = 0
    seen, losses = measure(loss_type=kind, huber_c=0.2, huber_schedule=schedule, mask=mask)
    alpha = ALPHAS[seen["timestep"].long()].float()
    sigma = ((1 - alpha) / alpha) ** 0.5
    c = torch.full((3,), 0.2) if schedule == "constant" else (1 - 0.2) / (1 + sigma) ** 2 + 0.2
    c = c.view(-1, 1, 1, 1)
    error = (noised(seen["timestep"], NOISE) * 0.5 - NOISE)[..., 4:]
    expected = (2 * c if kind == "huber" else 2) * (torch.sqrt(error**2 + c**2) - c)
    torch.testing.assert_close(losses.loss / IMPORTANCE, mean(expected), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.raw, mean(error**2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("target", ["epsilon", "v", "rectified_flows"])
@pytest.mark.parametrize("gamma", [1.0, 7.0])
def test_min_snr_gamma_weights_the_error_of_each_target(target, gamma):
    seen, losses = measure(target, min_snr_gamma=gamma)
    if target == "rectified_flows":
        share = seen["timestep"] / 1000
        snr = ((1 - share) / share) ** 2
        divisor = (snr.sqrt() + 1) ** 2
    else:
        alpha = ALPHAS[seen["timestep"].long()].float()
        snr = alpha / (1 - alpha)
        divisor = snr if target == "epsilon" else snr + 1
    torch.testing.assert_close(
        losses.loss / IMPORTANCE, losses.raw * snr.clamp(max=gamma) / divisor, rtol=1e-3, atol=1e-6
    )


def test_min_snr_and_huber_are_finite_where_the_last_timestep_is_nothing_but_noise():
    config = make_config(SdConfig, GIVEN | {"min_snr_gamma": 5, "loss_type": "huber"})
    process = with_loss(discrete_process("scaled_linear", "v", zero_terminal_snr=True), config, "v")
    diffused = process.diffuse(LATENTS, NOISE, t=torch.full((3,), 999))
    assert (diffused.logsnr < -60).all()
    losses = process.loss(diffused, torch.zeros_like(LATENTS))
    torch.testing.assert_close(losses.loss, torch.zeros(3))  # min(SNR, 5) / (SNR + 1)
    torch.testing.assert_close(losses.raw, mean(LATENTS**2))
    with pytest.raises(UserError, match="zero terminal SNR"):
        measure("epsilon", zero_terminal_snr=True)


def test_input_perturbation_is_noise_of_the_input_alone():
    seen, losses = measure(input_perturbation=0.1)
    perturbed = NOISE + 0.1 * RANDOM.normal("input perturbation", 4, 8, 16)
    x = noised(seen["timestep"], perturbed)
    torch.testing.assert_close(seen["noised"], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.raw, mean((x * 0.5 - NOISE) ** 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("target", ["epsilon", "rectified_flows"])
def test_offset_noise_shifts_whole_channels(target):
    seen, _ = measure(target, offset_noise=0.1)
    plain, _ = measure(target)
    shift = (seen["noised"] - plain["noised"]).flatten(2)
    assert (shift.amax(dim=2) - shift.amin(dim=2)).max() < 1e-5
    assert (shift.abs().amax(dim=(1, 2)) > 1e-3).all()


def test_multi_resolution_noise_is_a_pyramid():
    """Whitaker's loop with a factor of 2 between its grids; level 0 of his is folded into the first draw."""
    seen, losses = measure(multires_noise_iterations=10, multires_noise_discount=0.8)
    pyramid = NOISE * math.sqrt(2)
    for level in (1, 2, 3):  # 4 x 8, 2 x 4, 1 x 2
        small = RANDOM.normal(f"noise of level {level}", 4, 8 // 2**level, 16 // 2**level)
        pyramid += F.interpolate(small, size=(8, 16), mode="bilinear") * 0.8**level
    pyramid = torch.stack([of_sample / of_sample.std() for of_sample in pyramid])
    x = noised(seen["timestep"], pyramid)
    torch.testing.assert_close(seen["noised"], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.raw, mean((x * 0.5 - pyramid) ** 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_snr_gamma": 5, "loss_weight": "debiased"}, "min_snr_gamma contradicts loss_weight: debiased"),
        ({"min_snr_gamma": 5, "adaptive_loss_weight": True}, "min_snr_gamma contradicts adaptive_loss_weight"),
        ({"offset_noise": 0.1, "multires_noise_iterations": 6}, "exclude each other"),
        ({"loss_type": "l1"}, "huber"),
        ({"optimizer": "prodigy"}, "write lr: 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    for kind in (SdConfig, StageCConfig):
        with pytest.raises(ConfigError, match=words):
            make_config(kind, GIVEN | changes)


@pytest.mark.parametrize(
    "keys", [{}, {"offset_noise": 0.1, "input_perturbation": 0.1, "shift": 3.0}, {"multires_noise_iterations": 4}]
)
def test_a_given_level_is_a_timestep_or_a_share_of_the_noise_whatever_the_config_trains(keys):
    level = RANDOM.at(0.25)
    seen, losses = measure(random=level, **keys)
    assert seen["timestep"].tolist() == [250] * 3
    torch.testing.assert_close(seen["noised"], noised(seen["timestep"], NOISE), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.raw, mean((seen["noised"] * 0.5 - NOISE) ** 2))
    seen, losses = measure("rectified_flows", random=level, own_shift=2.0, **keys)
    torch.testing.assert_close(seen["timestep"], torch.full((3,), 250.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["noised"], 0.75 * LATENTS + 0.25 * NOISE, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses.raw, mean((seen["noised"] * 0.5 - (NOISE - LATENTS)) ** 2))
