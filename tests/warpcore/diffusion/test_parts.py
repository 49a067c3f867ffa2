"""Schedules, scalers, targets, noise conditions and loss weights: what must hold beyond golden numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.loss_weights import (
    LOSS_WEIGHTS,
    AdaptiveLossWeight,
    ConstantLossWeight,
    MinSNRLossWeight,
    for_target,
)
from warpcore.diffusion.noise_conditions import (
    NOISE_CONDITIONS,
    CosineTNoiseCond,
    DiscreteNoiseCond,
    RectifiedFlowsNoiseCond,
    SigmoidNoiseCond,
    StableDiffusionNoiseCond,
)
from warpcore.diffusion.scalers import SCALERS, LERPScaler, VPScaler
from warpcore.diffusion.schedules import (
    SCHEDULES,
    AdaptiveTrainSchedule,
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    StableDiffusionSchedule,
)
from warpcore.diffusion.tables import make_table
from warpcore.diffusion.targets import TARGETS, EpsilonTarget

ALL_SCHEDULES = {name: make() for name, make in SCHEDULES.items()} | {
    "table": make_table(),
    "interpolated": InterpolatedSchedule(CosineSchedule(), LinearSchedule(), shifts=(1.0, 0.5)),
}


def gdf(
    schedule="cosine", scaler="vp", target="epsilon", noise_cond="cosine_t", loss_weight="constant", **kwargs
) -> GDF:
    return GDF(
        ALL_SCHEDULES[schedule],
        SCALERS[scaler](),
        TARGETS[target](),
        NOISE_CONDITIONS[noise_cond](),
        LOSS_WEIGHTS[loss_weight](),
        **kwargs,
    )


@given(
    st.sampled_from(sorted(ALL_SCHEDULES)),
    st.sampled_from(sorted(SCALERS)),
    st.sampled_from(sorted(TARGETS)),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
    st.floats(0.25, 4),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_true_prediction_gives_signal_and_noise_back(schedule, scaler, target, t, shift, stretch):
    diffusion = gdf(schedule, scaler, target)
    if stretch:
        diffusion.setup_limits()
    x0, epsilon = torch.randn(2, len(t), 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    diffused = diffusion.diffuse(x0, epsilon, t=torch.tensor(t, dtype=torch.float64), shift=shift)
    a, b = diffusion.input_scaler.weights(diffused.logsnr, x0)
    if stretch and min(a.min(), b.min()) < 1e-3:
        return  # at the stretched ends nothing is left of one of the two
    found_x0, found_epsilon = diffusion.undiffuse(diffused.noised, diffused.logsnr, diffused.target)
    torch.testing.assert_close(found_x0, x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found_epsilon, epsilon, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(ALL_SCHEDULES))
def test_more_t_and_more_shift_mean_more_noise(name):
    schedule, t = ALL_SCHEDULES[name], torch.linspace(0.05, 0.95, 50)
    assert (schedule(t).diff() < 0).all()
    assert (schedule(t, shift=2) < schedule(t)).all()


@pytest.mark.parametrize(
    ("schedule", "cond"),
    [(CosineSchedule(), CosineTNoiseCond()), (StableDiffusionSchedule(), StableDiffusionNoiseCond())],
)
def test_a_noise_condition_inverts_its_schedule(schedule, cond):
    t = torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
    torch.testing.assert_close(cond(schedule(t)), t, atol=2e-5, rtol=0)


def test_equal_signal_and_noise_are_one_half_each_on_a_straight_path():
    assert [weight.item() for weight in LERPScaler()(torch.zeros(1))] == [0.5, 0.5]


def test_stretched_limits_reach_pure_noise_and_the_clean_signal():
    scaler, schedule = VPScaler(), CosineSchedule()
    scaler.setup_limits(schedule, scaler)
    a, b = scaler(schedule(torch.tensor([0.0, 1.0])))
    torch.testing.assert_close(torch.stack([a, b]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-6, rtol=0)


def test_offset_noise_moves_whole_channels():
    x0 = epsilon = torch.zeros(2, 3, 4, 4)
    offset = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    diffused = gdf(offset_noise=0.1).diffuse(x0, epsilon, t=torch.tensor([0.5, 1.0]), offset=offset)
    torch.testing.assert_close(diffused.noise, (0.1 * offset).expand_as(x0))
    torch.testing.assert_close(diffused.target, diffused.noise)


@pytest.mark.parametrize(
    ("offset_noise", "kwargs", "message"),
    [
        (0.0, {}, "needs uniform draws, t or a level"),
        (0.0, {"t": torch.ones(1), "uniform": torch.ones(1)}, "needs uniform draws, t or a level"),
        (0.1, {"t": torch.ones(1)}, "offset"),
        (0.0, {"t": torch.ones(1), "offset": torch.ones(1, 1, 1, 1)}, "offset"),
    ],
)
def test_diffuse_says_which_draws_it_lacks(offset_noise, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gdf(offset_noise=offset_noise).diffuse(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), **kwargs)


losses = st.lists(st.tuples(st.floats(-12, 12), st.floats(0, 10)), min_size=1, max_size=30)


@given(losses, st.integers(3, 8), st.floats(0.0, 0.99))
@settings(max_examples=100, deadline=None)
def test_adaptive_weights_count_every_sample_of_a_bucket(samples, buckets, beta):
    logsnr, loss = torch.tensor(samples).unbind(1)
    at_once, one_by_one = (AdaptiveLossWeight(buckets=buckets) for _ in range(2))
    at_once.update_buckets(logsnr, loss, beta=beta)
    expected = [1.0] * buckets
    for value, sample_loss in zip(logsnr.tolist(), loss.tolist(), strict=True):
        bucket = sum(edge < value for edge in one_by_one.bucket_ranges.tolist())
        expected[bucket] = expected[bucket] * beta + sample_loss * (1 - beta)
        one_by_one.update_buckets(torch.tensor([value]), torch.tensor([sample_loss]), beta=beta)
    torch.testing.assert_close(at_once.bucket_losses, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at_once.bucket_losses, one_by_one.bucket_losses, atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_not_finite_leaves_its_bucket_alone():
    weight = AdaptiveLossWeight(buckets=3)  # grid -10, 10
    weight.update_buckets(torch.zeros(3), torch.tensor([float("nan"), 3.0, float("inf")]), beta=0.5)
    assert weight.bucket_losses.tolist() == [1.0, 2.0, 1.0]


def test_an_adaptive_schedule_draws_buckets_by_their_loss():
    schedule = AdaptiveTrainSchedule(logsnr_range=(-2, 2), buckets=4, min_probs=0.5)
    schedule.update_buckets(torch.tensor([-1.5, -1.5, 0.5, 99.0]), torch.tensor([4.0, 2.0, 5.0, 0.0]), beta=0.0)
    assert schedule.bucket_probs.tolist() == [0.0, 1.0, 5.0, 1.0]
    uniform = (torch.arange(9000) + 0.5) / 9000
    logsnr = schedule(schedule.training_t(uniform))
    counts = torch.histc(logsnr, bins=4, min=-2, max=2)
    torch.testing.assert_close(counts / 9000, torch.tensor([0.5, 1.5, 5.5, 1.5]) / 9, atol=1e-3, rtol=0)
    inside = logsnr[(logsnr > 0) & (logsnr < 1)]
    assert inside.mean().item() == pytest.approx(0.5, abs=1e-3)


def adaptive() -> GDF:
    return GDF(AdaptiveTrainSchedule(), VPScaler(), EpsilonTarget(), CosineTNoiseCond(), AdaptiveLossWeight())


@pytest.mark.bits
def test_the_state_of_adaptive_parts_survives_a_checkpoint():
    trained, resumed = adaptive(), adaptive()
    logsnr = torch.linspace(-11, 11, 64)
    trained.update_buckets(logsnr, logsnr.exp().clamp(max=10))
    resumed.load_state_dict(load(save(trained.state_dict())))
    uniform = torch.linspace(0, 0.999, 77)
    x0 = torch.zeros(77, 1, 1, 1)
    before, after = (part.diffuse(x0, x0, uniform) for part in (trained, resumed))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, after, strict=True))
    assert not torch.equal(before.loss_weight, torch.ones(77))


def test_the_state_of_another_diffusion_is_refused_by_name():
    with pytest.raises(ValueError, match=r"loss_weight\.bucket_losses"):
        gdf().load_state_dict(adaptive().state_dict())
    assert gdf().state_dict() == {}


def test_a_shift_of_the_loss_weight_acts_on_the_weight_alone():
    diffusion = gdf(loss_weight="snr")
    x0, t = torch.zeros(2, 1, 1, 1), torch.tensor([0.3, 0.6])
    plain, shifted = (diffusion.diffuse(x0, x0, t=t, loss_shift=shift) for shift in (1.0, 2.0))
    assert torch.equal(plain.logsnr, shifted.logsnr)
    torch.testing.assert_close(shifted.loss_weight, 4 * plain.loss_weight)
    assert ConstantLossWeight(2.0)(t).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("name", [name for name, kind in LOSS_WEIGHTS.items() if kind.of is not None])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_loss_weight_weighs_the_same_error_whatever_the_network_predicts(name, target):
    """One wrong guess of the clean signal costs the same, written as x0, as noise, as v, or as a flow."""
    scaler = "lerp" if target == "rectified_flows" else "vp"
    own, here = (TARGETS[one]() for one in (LOSS_WEIGHTS[name].of, target))
    logsnr = torch.linspace(-8, 8, 33, dtype=torch.float64)
    x0, epsilon, wrong = torch.randn(3, 33, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = SCALERS[scaler]().weights(logsnr, x0)
    noised, guess = a * x0 + b * epsilon, x0 + 0.1 * wrong
    noise = (noised - a * guess) / b
    error_here, error_own = (
        (one(guess, noise, logsnr, a, b) - one(x0, epsilon, logsnr, a, b)).square().mean(dim=1) for one in (here, own)
    )
    weight = for_target(LOSS_WEIGHTS[name](), target)(logsnr)
    torch.testing.assert_close(error_here * weight, error_own * LOSS_WEIGHTS[name]()(logsnr))


def test_min_snr_is_the_published_weight_of_each_target():
    logsnr = torch.linspace(-6, 6, 25)
    snr, capped = logsnr.exp(), logsnr.exp().clamp(max=5)
    for target, expected in {"x0": capped, "epsilon": capped / snr, "v": capped / (snr + 1)}.items():
        torch.testing.assert_close(for_target(MinSNRLossWeight(), target)(logsnr), expected)
        assert for_target(MinSNRLossWeight(), target)(torch.tensor([-80.0, 80.0])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discrete_noise_condition_finds_every_whole_step(dtype):
    steps = torch.arange(1000).to(dtype)
    logsnr = {SigmoidNoiseCond: -(steps / 1000).logit(), RectifiedFlowsNoiseCond: 2 * (steps / 1000).logit()}
    for kind, of_step in logsnr.items():
        assert torch.equal(DiscreteNoiseCond(kind())(of_step), steps), kind
    assert DiscreteNoiseCond(SigmoidNoiseCond())(torch.tensor([-100.0], dtype=dtype)).item() == 999
