"""Learned variances: tables, the loss and its variational bound, against the golden cases and the mathematics."""

import pytest
import torch
from torch import Tensor

from tests.fake_gpu import GPU, FakeGpu
from tests.golden import load_case, resolve
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.huber import PseudoHuber
from warpcore.diffusion.learned_variance import Posterior, binned_log_likelihood
from warpcore.diffusion.processes import discrete_process
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.errors import UserError

TABLES, TABLE_TENSORS = load_case("opensora/iddpm_tables")
TRAINING, TRAINING_TENSORS = load_case("opensora/iddpm_training")


def process(**settings) -> GDF:
    return discrete_process("linear", learned_variance=True, **settings)


@pytest.mark.parametrize("call", TABLES["calls"], ids=lambda call: call["name"])
def test_tables_are_those_of_the_reference(call):
    table = process().schedule.alphas_cumprod
    if isinstance(call["timestep_map"], list):
        table = table[call["timestep_map"]]
    posterior = Posterior.along(torch.cat([torch.ones(1, dtype=torch.float64), table]))
    mine = {
        "alphas_cumprod": table.float(),
        "betas": posterior.betas,
        "posterior_mean_coef1": posterior.x0_weight,
        "posterior_mean_coef2": posterior.x_weight,
        "posterior_log_variance_clipped": posterior.clipped_log_variance,
    }
    atol = call["result_stats"]["suggested_atol"]
    for name, expected in resolve(call["result"], TABLE_TENSORS).items():
        if name in mine:
            torch.testing.assert_close(mine[name], expected, rtol=0, atol=atol)
        else:  # posterior_variance, which is 0 at the first step
            torch.testing.assert_close(mine["posterior_log_variance_clipped"][1:].exp(), expected[1:])


@pytest.mark.parametrize("call", TRAINING["calls"], ids=lambda call: call["name"])
def test_the_loss_is_that_of_the_reference(call):
    given = resolve({"x0": call["args"][0], "t": call["integer_draw"], **call["kwargs"]}, TRAINING_TENSORS)
    expected = resolve(call["result"], TRAINING_TENSORS)
    diffusion, mask = process(), given.get("mask")
    diffused = diffusion.diffuse(given["x0"], given["noise"], t=given["t"])
    if mask is not None:  # frames that are given have the noise of timestep 0
        mask = mask[:, None, :, None, None]
        least = diffusion.diffuse(given["x0"], given["noise"], t=torch.zeros_like(given["t"])).noised
        diffused = diffused._replace(noised=torch.where(mask, diffused.noised, least))
        mask = mask.float()
    atol = call["result_stats"]["suggested_atol"]
    torch.testing.assert_close(diffused.noised, expected["x_t"], rtol=0, atol=atol)
    loss, raw, _ = diffusion.loss(diffused._replace(noised=expected["x_t"]), expected["network_output"], mask)
    torch.testing.assert_close(raw, expected["mse"], rtol=0, atol=atol)
    torch.testing.assert_close(loss - raw, expected["vb"], rtol=0, atol=atol)
    torch.testing.assert_close(loss, expected["loss"], rtol=0, atol=atol)


def a_batch(diffusion: GDF, channels: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, channels, 3, 3, generator=generator).clamp(-1, 1)
    return diffusion.diffuse(x0, noise, t=torch.tensor([0, 3, 400, 999])), noise


def test_the_bound_teaches_variances_only():
    diffusion = process()
    diffused, noise = a_batch(diffusion)
    prediction = torch.cat([noise + 0.1, torch.zeros_like(noise)], dim=1).requires_grad_()
    loss, _, _ = diffusion.loss(diffused, prediction)
    loss.sum().backward()
    found, variance = prediction.grad.chunk(2, dim=1)
    torch.testing.assert_close(found, torch.full_like(found, 2 * 0.1 / found[0].numel()))
    assert (variance != 0).all()


def test_the_bound_is_least_at_the_best_variance():
    """A step of wrong mean is best described by the variance of the posterior, and the square of the error on top."""
    diffusion, t = process(), 400
    x0, noise = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.8)
    diffused = diffusion.diffuse(x0, noise, t=torch.tensor([t]))
    posterior = Posterior.along(torch.cat([torch.ones(1, dtype=torch.float64), diffusion.schedule.alphas_cumprod])).at(
        t
    )
    found = noise + 0.02
    off, _ = diffusion.undiffuse(diffused.noised, diffused.logsnr, found)
    best = posterior.clipped_log_variance.exp() + (posterior.x0_weight * (off - x0)).square()
    v = torch.linspace(-1, 1, 2001)
    bounds = torch.cat(
        [diffusion.variance.bound(x0, diffused.noised, off, one.view_as(x0), diffused.logsnr).view(1) for one in v]
    )
    assert posterior.log_variance(v[bounds.argmin()]).exp().item() == pytest.approx(best.item(), rel=1e-3)
    assert (bounds >= 0).all()


def test_loss_weights_and_errors_change_the_mean_squares_and_not_the_bound():
    plain, weighted = process(), process(loss_weight="min_snr")
    weighted.error = PseudoHuber(0.1, "constant", False)
    diffused, noise = a_batch(plain)
    prediction = torch.cat([noise + 0.5, 0.1 * noise], dim=1)
    loss, raw, _ = plain.loss(diffused, prediction)
    changed, same_raw, _ = weighted.loss(a_batch(weighted)[0], prediction)
    weights = a_batch(weighted)[0].loss_weight
    error = weighted.error(prediction[:, :2] - noise, diffused.logsnr).mean(dim=(1, 2, 3))
    torch.testing.assert_close(same_raw, raw)
    torch.testing.assert_close(changed, error * weights + loss - raw)


def test_likelihoods_of_all_values_of_a_picture_sum_to_one():
    values = torch.linspace(-1, 1, 256)
    for mean, deviation in ((0.0, 0.3), (0.9, 0.5), (-1.2, 0.02)):
        log_variance = 2 * torch.tensor(deviation).log()
        total = binned_log_likelihood(values, torch.tensor(mean), log_variance).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("diffusion", "channels"), [(process(), 2), (process(), 3), (discrete_process(), 4)])
def test_a_network_of_other_channels_is_refused(diffusion, channels):
    wrong = torch.zeros(4, channels, 3, 3)
    with pytest.raises(UserError, match=f"the network predicts {channels} channels of latents with 2"):
        diffusion.loss(a_batch(diffusion)[0], wrong)
    with pytest.raises(UserError, match=f"the network predicts {channels} channels of latents with 2"):
        next(diffusion.sample(lambda x, r: wrong, {}, torch.zeros(4, 2, 3, 3)))


def test_a_sampler_of_learned_variances_is_refused_before_the_network_is_asked():
    def network(x: Tensor, r: Tensor) -> Tensor:
        raise AssertionError("was asked")

    diffusion = discrete_process()
    sampler = DIT_SAMPLERS["iddpm"](diffusion.input_scaler)
    with pytest.raises(UserError, match="sampler: iddpm needs a network that learns the variance"):
        next(diffusion.sample(network, {}, torch.zeros(1, 2, 3, 3), sampler=sampler))


def test_the_loss_waits_for_no_gpu():
    diffusion = process()
    with FakeGpu() as gpu, gpu.watched():
        x0, uniform = torch.zeros(3, 4, 2, 2, device=GPU), torch.zeros(3, device=GPU)
        diffused = diffusion.diffuse(x0, x0, uniform)
        assert {tensor.device for tensor in diffusion.loss(diffused, torch.cat([x0, x0], dim=1))} == {GPU}
