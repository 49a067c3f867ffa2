"""Samplers and guidance, against analytic solutions, diffusers and what guidance promises."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.guidance import Guidance, pair_conditions
from warpcore.diffusion.loss_weights import ConstantLossWeight
from warpcore.diffusion.multistep_samplers import DPMSolverPP2MSampler
from warpcore.diffusion.noise_conditions import LogSNRNoiseCond
from warpcore.diffusion.samplers import SAMPLERS, DDIMSampler, DDPMSampler, LCMSampler
from warpcore.diffusion.scalers import SCALERS, VPScaler
from warpcore.diffusion.schedules import CosineSchedule, LinearSchedule
from warpcore.diffusion.targets import TARGETS
from warpcore.diffusion.times import Steps

DEVIATION = 0.5  # of the Gaussian data that the analytic denoiser knows


def gdf(scaler="vp", target="v", schedule=None) -> GDF:
    schedule = schedule or LinearSchedule(logsnr_range=(-6, 6))
    return GDF(schedule, SCALERS[scaler](), TARGETS[target](), LogSNRNoiseCond(), ConstantLossWeight())


class GaussianDenoiser:
    """The best denoiser of data from N(0, DEVIATION^2), for any scaler and target."""

    def __init__(self, diffusion: GDF):
        self.diffusion = diffusion

    def __call__(self, x, r):
        a, b = self.diffusion.input_scaler.weights(r, x)
        x0 = a * DEVIATION**2 * x / (a**2 * DEVIATION**2 + b**2)
        return self.diffusion.target(x0, (x - a * x0) / b, r, a, b)

    def deviation(self, t: float) -> float:
        """Of a sample at time t: the probability flow multiplies a sample by the quotient of these."""
        a, b = self.diffusion.input_scaler(self.diffusion.schedule(torch.tensor([t], dtype=torch.float64)))
        return (a**2 * DEVIATION**2 + b**2).sqrt().item()


def error(sampler: str, timesteps: int, scaler: str, target: str) -> float:
    diffusion = gdf(scaler, target)
    model = GaussianDenoiser(diffusion)
    x_init = torch.tensor([[1.0]], dtype=torch.float64)
    *_, (_, x, _) = diffusion.sample(
        model, {}, x_init, sampler=SAMPLERS[sampler](diffusion.input_scaler), steps=Steps(timesteps)
    )
    return abs(x.item() - model.deviation(0.0) / model.deviation(1.0))


@pytest.mark.parametrize(
    ("scaler", "target"), [("vp", "epsilon"), ("vp", "v"), ("lerp", "rectified_flows"), ("lerp", "x0")]
)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_a_deterministic_sampler_converges_in_its_order(sampler, order, scaler, target):
    coarse, fine = (error(sampler, timesteps, scaler, target) for timesteps in (80, 160))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert fine < 2 * 80 ** -float(order)


@pytest.mark.parametrize("target", ["epsilon", "v", "x0"])
def test_dpm_solver_agrees_with_diffusers(target):
    diffusion = gdf("vp", target, CosineSchedule())
    steps, x = 12, torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x, r):
        return (x * torch.arange(1, 4, dtype=x.dtype)[:, None, None]).sin() + 0.1 * r[:, None, None, None]

    prediction = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[target]
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type=prediction,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    theirs.set_timesteps(steps)
    logsnr = diffusion.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    theirs.sigmas = (-logsnr / 2).exp()
    mine = DPMSolverPP2MSampler(diffusion.input_scaler)
    for timestep, now, later in zip(theirs.timesteps, logsnr[:-1, None], logsnr[1:, None], strict=True):
        pred = model(x, now)
        x0, epsilon = diffusion.undiffuse(x, now, pred)
        found = mine.step(x, x0, epsilon, now, later)
        x = theirs.step(pred, timestep, x).prev_sample
        torch.testing.assert_close(found.float(), x.float(), atol=1e-5, rtol=1e-5)  # theirs works in float32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stretched_limits_and_plateaus_of_a_schedule_keep_samples_finite(sampler):
    for shift, stretch in ((1.0, True), (4.0, False)):
        diffusion = gdf("vp", "v", CosineSchedule())
        if stretch:
            diffusion.setup_limits()
        noise = torch.Generator().manual_seed(0)
        steps = diffusion.sample(
            lambda x, r: -x.tanh(),
            {},
            torch.randn(2, 3, generator=noise),
            sampler=SAMPLERS[sampler](diffusion.input_scaler),
            steps=Steps(25, shift=shift),
            noise=lambda step, noise=noise: torch.randn(2, 3, generator=noise),
        )
        assert all(torch.isfinite(x).all() and torch.isfinite(x0).all() for x0, x, _ in steps)


def test_ancestral_samples_have_the_deviation_of_the_data():
    diffusion, generator = gdf(), torch.Generator().manual_seed(0)
    draws = torch.randn(151, 8_000, 1, generator=generator)
    *_, (x0, _, _) = diffusion.sample(
        GaussianDenoiser(diffusion),
        {},
        draws[150],
        sampler=DDPMSampler(diffusion.input_scaler),
        steps=Steps(150),
        noise=lambda step: draws[step],
    )
    assert x0.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_only_random_samplers_draw_noise():
    diffusion, x = gdf(), torch.ones(1, 1)
    model = GaussianDenoiser(diffusion)

    def no_noise(step):
        raise AssertionError("drew noise")

    for sampler in (DDIMSampler(diffusion.input_scaler), DPMSolverPP2MSampler(diffusion.input_scaler)):
        list(diffusion.sample(model, {}, x, sampler=sampler, noise=no_noise))
    for sampler in (
        DDIMSampler(diffusion.input_scaler, eta=0.5),
        DDPMSampler(diffusion.input_scaler),
        LCMSampler(diffusion.input_scaler),
    ):
        with pytest.raises(ValueError, match=f"{type(sampler).__name__} is random: pass `noise`"):
            next(diffusion.sample(model, {}, x, sampler=sampler))


def test_a_picture_is_noised_and_sampled_from_the_middle():
    diffusion = gdf()
    model, epsilon = GaussianDenoiser(diffusion), torch.full((1, 1), 0.3, dtype=torch.float64)
    picture = torch.full((1, 1), 0.7, dtype=torch.float64)
    x_init = diffusion.diffuse(picture, epsilon, t=torch.tensor([0.4], dtype=torch.float64)).noised
    *_, (_, x, _) = diffusion.sample(
        model, {}, x_init, steps=Steps(40, start=0.4, end=0.1), sampler=DPMSolverPP2MSampler(diffusion.input_scaler)
    )
    assert x.item() == pytest.approx(x_init.item() * model.deviation(0.1) / model.deviation(0.4), rel=1e-3)


@pytest.mark.parametrize("kwargs", [{"number": 0}, {"start": 0.2, "end": 0.2}, {"start": 1.5}])
def test_impossible_times_are_refused(kwargs):
    diffusion = gdf()
    with pytest.raises(ValueError, match="0 <= end < start <= 1"):
        next(diffusion.sample(GaussianDenoiser(diffusion), {}, torch.ones(1, 1), steps=Steps(**kwargs)))


def test_half_precision_latents_are_sampled_in_float32_without_gradients():
    diffusion, network = gdf(), torch.nn.Linear(3, 3)
    model = lambda x, r: network(x).bfloat16()  # noqa: E731
    for x0, x, pred in diffusion.sample(model, {}, torch.ones(2, 3, dtype=torch.bfloat16), steps=Steps(2)):
        assert {x0.dtype, x.dtype, pred.dtype} == {torch.float32}
        assert not x.requires_grad


class Recorder:
    """A model that remembers its calls and predicts the mean of each sample's `text`."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, r, **conditions):
        self.calls.append((x, r, conditions))
        return conditions["text"].mean(dim=(1, 2))[:, None, None, None].expand_as(x) + 0.1 * x


def conditions(batch_size: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(batch_size, *shape, generator=generator)  # noqa: E731
    return {"text": draw(5, 4), "image": draw(1, 3), "cnet": [None, draw(2, 2, 2)], "unused": None}


def test_conditions_are_paired_by_name_whatever_their_order():
    positive, negative = conditions(2, 0), conditions(2, 1)
    pairs = pair_conditions(positive, dict(reversed(negative.items())), 2)
    assert torch.equal(pairs["text"], torch.cat([positive["text"], negative["text"]]))
    assert torch.equal(pairs["image"], torch.cat([positive["image"], negative["image"]]))
    assert pairs["cnet"][0] is None
    assert torch.equal(pairs["cnet"][1], torch.cat([positive["cnet"][1], negative["cnet"][1]]))
    assert pairs["unused"] is None


def test_one_unconditional_sample_serves_the_whole_batch_and_none_given_means_zeros():
    positive, negative = conditions(3, 0), conditions(1, 1)
    assert torch.equal(pair_conditions(positive, negative, 3)["text"][3:], negative["text"].expand(3, 5, 4))
    assert not pair_conditions(positive, None, 3)["cnet"][1][3:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ...}, "the unconditional ones lack image"),
        ({"extra": torch.ones(2, 1)}, "the conditional ones lack extra"),
        ({"text": torch.ones(2, 6, 4)}, r"text is a tensor of shape \(2, 5, 4\), but unconditionally .*\(2, 6, 4\)"),
        ({"text": None}, "text is a tensor .* but unconditionally None"),
        ({"cnet": [None]}, "cnet is a list of 2, but unconditionally a list of 1"),
        ({"cnet": [None, None]}, r"cnet\[1\] is a tensor .* but unconditionally None"),
        ({"text": torch.ones(4, 5, 4)}, "text has shape .* but the batch holds 2 samples"),
    ],
)
def test_conditions_that_do_not_pair_are_named(change, message):
    negative = {name: value for name, value in (conditions(2, 1) | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        pair_conditions(conditions(2, 0), negative, 2)


@pytest.mark.bits
def test_guidance_runs_one_forward_of_both_halves_inside_its_window_only():
    diffusion, model = gdf(), Recorder()
    x_init = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    windowed = {"guidance": Guidance(4.0, t_start=0.75, t_stop=0.5), "steps": Steps(4)}
    steps = list(diffusion.sample(model, conditions(2, 0), x_init, unconditional=conditions(2, 1), **windowed))
    assert [len(x) for x, _, _ in model.calls] == [2, 4, 4, 2]  # t = 1, 0.75, 0.5, 0.25
    assert all(len(r) == len(x) == len(given["text"]) for x, r, given in model.calls)
    assert torch.equal(*model.calls[1][0].chunk(2))

    model.calls.clear()
    free = list(diffusion.sample(model, conditions(2, 0), x_init, steps=Steps(4)))
    assert [len(x) for x, _, _ in model.calls] == [2] * 4
    assert torch.equal(free[0][1], steps[0][1])
    assert not torch.allclose(free[1][1], steps[1][1])


def test_the_scale_of_guidance_may_follow_t():
    assert Guidance(3.0).scale_at(0.2) == 3.0
    assert Guidance((7.0, 2.0)).scale_at(0.2) == pytest.approx(3.0)
    assert Guidance(lambda t: 10 * t).scale_at(0.2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two numbers"):
        Guidance((1.0, 2.0, 3.0))


def test_rescaled_guidance_keeps_deviations_and_does_not_depend_on_the_rest_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        torch.randn(2, 4, 3, 5, 5, generator=generator) * torch.tensor([1, 2, 5, 9])[:, None, None, None]
    )
    guidance = Guidance(5.0, rho=1.0)
    whole = guidance.combine(positive, negative, 5.0)
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)))
    torch.testing.assert_close(guidance.combine(positive[:1], negative[:1], 5.0), whole[:1])
    published = Guidance(5.0, rho=1.0, rescale_over_batch=True).combine(positive, negative, 5.0)
    torch.testing.assert_close(published.std(), positive.std())
    assert not torch.allclose(published[:1], whole[:1])


def test_a_scale_of_one_is_the_conditional_prediction():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 2, 3, 4, 4, generator=generator)
    torch.testing.assert_close(Guidance(1.0).combine(positive, negative, 1.0), positive)


def test_samplers_take_the_scaler_of_their_diffusion():
    diffusion = gdf("lerp", "rectified_flows")
    x0, epsilon = torch.ones(1, 1), torch.full((1, 1), 3.0)
    x = DDIMSampler(diffusion.input_scaler).step(x0, x0, epsilon, torch.tensor([-1.0]), torch.tensor([0.0]))
    assert x.item() == pytest.approx(2.0)
    assert VPScaler()(torch.zeros(1))[0].item() == pytest.approx(0.5**0.5)
