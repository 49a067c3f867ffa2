"""Schedules of discrete timesteps: tables, noising, loss weights and whole processes, against the golden case
`sd_t5/noise_schedules`, diffusers and the published formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fake_gpu import GPU, FakeGpu
from tests.golden import load_case, resolve
from warpcore.diffusion.diffusion import GDF, DenoisingLoss
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS, AdaptiveLossWeight, loss_weight_for
from warpcore.diffusion.noise_conditions import LogSNRNoiseCond, TimestepNoiseCond
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.scalers import VPScaler
from warpcore.diffusion.tables import BETAS, TableSchedule, betas_of, make_table, with_zero_terminal_snr
from warpcore.diffusion.targets import TARGETS, EpsilonTarget, VTarget
from warpcore.errors import UserError

SPEC, TENSORS = load_case("sd_t5/noise_schedules")
CALLS = {call["name"]: call for call in SPEC["calls"]}
TABLES = {
    "scaled_linear": ("scaled_linear", False),
    "linear": ("linear", False),
    "scaled_linear_zero_terminal_snr": ("scaled_linear", True),
}
WEIGHTS = [name for name in CALLS if ".min_snr" in name or ".debiased" in name]
THEIR_NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
RANGES = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02), "cosine": (1e-4, 0.02)}


def assert_golden(name: str, mine: Tensor) -> None:
    stats, theirs = CALLS[name]["result_stats"], resolve(CALLS[name]["result"], TENSORS)
    atol, rtol = stats.get("suggested_atol", 0.0), stats.get("suggested_rtol", 0.0)
    torch.testing.assert_close(mine.to(theirs.dtype), theirs, atol=atol, rtol=rtol)


def golden_table(name: str) -> TableSchedule:
    """The schedule of the golden alphas_cumprod, whose float32 rounding shows in SNR: 1 - 0.9999 has three digits."""
    return TableSchedule(TENSORS[f"out.{name}.alphas_cumprod"])


def diffusers_scheduler(name: str, steps: int = 1000, **kwargs) -> DDPMScheduler:
    start, end = RANGES[name]
    return DDPMScheduler(steps, beta_start=start, beta_end=end, beta_schedule=THEIR_NAMES[name], **kwargs)


@pytest.mark.parametrize("name", TABLES)
def test_golden_tables(name):
    kind, zero = TABLES[name]
    table = golden_table(name)
    assert_golden(f"{name}.snr", table.snr)
    if not zero:
        assert_golden(f"{name}.alphas_cumprod", (1 - BETAS[kind](1000, dtype=torch.float32)).cumprod(0))
    # Sums and roots in float32 round by 4e-7, differently on other CPUs: diffusers' own rescaled table is as far away
    # from the golden one as the exact table.
    exact = make_table(kind, zero_terminal_snr=zero).alphas_cumprod
    torch.testing.assert_close(exact, table.alphas_cumprod, atol=5e-7, rtol=0)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_noised_samples_and_velocities(name, dtype):
    """Latents in bfloat16 are noised in float32; the reference rounds the table too (`add_noise_in_bfloat16`), which
    leaves its first timesteps without noise."""
    x, noise, t = resolve(CALLS[f"{name}.add_noise"]["args"], TENSORS)
    table = golden_table(name)
    process = GDF(table, VPScaler(), VTarget(), TimestepNoiseCond(table), LOSS_WEIGHTS["constant"]())
    diffused = process.diffuse(x.to(dtype), noise.to(dtype), t=t)
    assert torch.equal(diffused.noise_cond, t)
    assert diffused.noised.dtype == diffused.target.dtype == torch.float32
    if dtype == torch.float32:
        assert_golden(f"{name}.add_noise", diffused.noised)
        assert_golden(f"{name}.velocity", diffused.target)
    else:
        rounded = process.diffuse(x.to(dtype).float(), noise.to(dtype).float(), t=t)
        assert torch.equal(diffused.noised, rounded.noised)
        assert torch.equal(diffused.target, rounded.target)


@pytest.mark.parametrize("name", WEIGHTS)
def test_golden_loss_weights(name):
    table_name, formula, *target = name.split(".")
    zero = TABLES[table_name][1]
    target = "v" if target == ["v_prediction"] else "epsilon"
    kind, settings = formula, {"max_snr": 1000}
    if formula.startswith("min_snr"):
        kind, settings = "min_snr", {"max_snr": float(formula.removeprefix("min_snr_"))}
    if zero and target == "epsilon":  # where the golden formulas give infinity, or 0 by an epsilon of 1e-8
        with pytest.raises(UserError, match=r"zero terminal SNR.* write one of the targets x0, v"):
            loss_weight_for(kind, target, zero_terminal_snr=True, **settings)
        return
    table = golden_table(table_name)
    weight = loss_weight_for(kind, target, zero_terminal_snr=zero, **settings)(table.logsnr)
    if target == "epsilon" and kind == "min_snr":  # the reference divides by SNR + 1e-8
        weight = weight * table.snr / (table.snr + 1e-8)
    assert_golden(name, weight)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [1000, 50])
def test_tables_are_those_of_diffusers(name, zero, steps):
    theirs = diffusers_scheduler(name, steps, rescale_betas_zero_snr=zero)
    mine = make_table(name, steps, zero_terminal_snr=zero)
    assert mine.betas.dtype == mine.alphas_cumprod.dtype == mine.snr.dtype == torch.float64
    torch.testing.assert_close(mine.alphas_cumprod, theirs.alphas_cumprod.double(), atol=2e-6, rtol=0)
    torch.testing.assert_close(mine.betas[:-1], theirs.betas[:-1].double(), atol=1e-6, rtol=1e-3)
    assert mine.zero_terminal_snr == zero
    assert (mine.snr[-1] == 0) == zero
    torch.testing.assert_close(mine.logsnr, mine.snr.log())


def test_zero_terminal_snr_keeps_the_first_timestep():
    betas = BETAS["scaled_linear"](1000)
    rescaled = with_zero_terminal_snr(betas)
    assert rescaled[-1] == 1
    torch.testing.assert_close(rescaled[0], betas[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(betas_of((1 - betas).cumprod(0)), betas)


@given(
    st.sampled_from(sorted(BETAS)),
    st.booleans(),
    st.integers(2, 1000),
    st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_the_network_is_told_the_whole_timestep_it_was_noised_at(name, zero, steps, uniform):
    process = discrete_process(name, "v", steps=steps, zero_terminal_snr=zero)
    t = process.schedule.training_t(torch.tensor(uniform))
    assert t.dtype == torch.int64
    exact = torch.tensor(uniform, dtype=torch.float64) * steps  # a product in float32 may round up to the next step
    assert (t <= exact + 1e-3).all()
    assert (t > exact - 1).all()
    assert t.max() < steps
    x0 = torch.ones(len(t), 2)
    diffused = process.diffuse(x0, -x0, torch.tensor(uniform))
    assert torch.equal(diffused.noise_cond, t)
    signal = process.schedule.alphas_cumprod[t].sqrt()[:, None]
    torch.testing.assert_close(diffused.noised.double(), signal - (1 - signal**2).sqrt() + 0 * x0, atol=1e-6, rtol=0)


def test_every_timestep_is_found_again_on_a_device_that_has_float32_alone():
    for zero in (False, True):
        table = make_table("linear", zero_terminal_snr=zero)
        table._logsnr_on[torch.device("cpu")] = table.logsnr.float()
        steps = torch.arange(1000)
        assert torch.equal(table.timestep(table(steps)), steps.float())
        assert table(torch.tensor([-1])).item() == math.inf


@pytest.mark.parametrize("zero", [False, True])
def test_noising_by_a_table_waits_for_no_gpu(zero):
    process = discrete_process("scaled_linear", "v", "min_snr", zero_terminal_snr=zero)
    with FakeGpu() as gpu, gpu.watched():
        x0, uniform = torch.zeros(3, 4, 2, 2, device=GPU), torch.zeros(3, device=GPU)
        diffused = process.diffuse(x0, x0, uniform)
        assert {tensor.device for tensor in (*diffused, *process.loss(diffused, x0))} == {GPU}


def test_between_two_timesteps_a_table_is_linear_in_logsnr():
    table = make_table()
    between = torch.tensor([10.25, 998.5], dtype=torch.float64)
    expected = torch.lerp(table.logsnr[[10, 998]], table.logsnr[[11, 999]], between % 1)
    torch.testing.assert_close(table(between / 999), expected)
    torch.testing.assert_close(table.timestep(expected), between)
    assert TimestepNoiseCond(table)(expected).tolist() == [10, 998]
    torch.testing.assert_close(TimestepNoiseCond(table, fractional=True)(expected), between)
    torch.testing.assert_close(table(between / 999, shift=2.0), expected - 2 * math.log(2))


@pytest.mark.parametrize("table", [[0.5], [0.9, 0.9], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1]])
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(ValueError, match="numbers that fall"):
        TableSchedule(torch.tensor(table))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LOSS_WEIGHTS)
@pytest.mark.parametrize("zero", [False, True])
def test_a_pair_of_weight_and_target_gives_finite_losses_or_is_refused_with_those_that_make_sense(name, target, zero):
    table = make_table(zero_terminal_snr=zero)
    try:
        weight = loss_weight_for(name, target, zero_terminal_snr=zero)
    except UserError as error:
        assert (zero and target == "epsilon") or target not in LOSS_WEIGHTS[name].targets
        named = str(error).split("write one of")[1]
        assert any(other in named for other in (*TARGETS, *LOSS_WEIGHTS))
        return
    process = GDF(table, VPScaler(), TARGETS[target](), TimestepNoiseCond(table), weight)
    x0, noise = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(1000) + 0.5) / 1000
    loss, raw, logsnr = process.loss(process.diffuse(x0, noise, uniform), torch.zeros_like(x0))
    assert loss.isfinite().all()
    assert raw.isfinite().all()
    torch.testing.assert_close(
        raw, process.target(x0, noise, logsnr, *VPScaler().weights(logsnr, x0)).square().mean(1)
    )
    torch.testing.assert_close(loss, raw * weight(logsnr))


def test_every_weight_has_a_sensible_target_and_every_target_a_sensible_weight():
    assert all(kind.targets and set(kind.targets) <= set(TARGETS) for kind in LOSS_WEIGHTS.values())
    assert {target for kind in LOSS_WEIGHTS.values() for target in kind.targets} == set(TARGETS)
    assert all(kind.of in kind.targets for kind in LOSS_WEIGHTS.values() if kind.of is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("truncated_snr", "epsilon"),
            "truncated_snr makes no sense for the target epsilon; write one of the loss "
            "weights constant, p2, min_snr, .* or one of the targets x0, v",
        ),
        (
            ("p2", "rectified_flows"),
            "p2 makes no sense .* constant, snr_plus_one, min_snr, sech, sigmoid, adaptive, or .* epsilon",
        ),
        (("min_snr", "noise"), "target: 'noise' is unknown; write one of epsilon"),
        (("snr5", "v"), "loss_weight: 'snr5' is unknown; write one of constant"),
    ],
)
def test_what_makes_no_sense_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        loss_weight_for(*arguments)


def test_noise_is_not_predicted_where_there_is_nothing_else():
    table = make_table(zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"zero terminal SNR.* \(target epsilon\)"):
        GDF(table, VPScaler(), EpsilonTarget(), LogSNRNoiseCond(), AdaptiveLossWeight())
    with pytest.raises(UserError, match="noise schedule: 'quadratic' is unknown; write one of scaled_linear, linear"):
        make_table("quadratic")


def test_a_flow_is_the_published_one():
    """Stable Diffusion 3 and `FlowMatchEulerDiscreteScheduler`: s noise + (1 - s) x, the network's time 1000 s."""
    process = flow_process(min_sigma=1e-3, steps=999)
    u = torch.tensor([0.0, 0.25, 0.9375])
    s = u * (1 - 2e-3) + 1e-3
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    diffused = process.diffuse(x0, noise, 1 - u)
    torch.testing.assert_close(diffused.noised, s[:, None] * noise + (1 - s[:, None]) * x0)
    torch.testing.assert_close(diffused.target, noise - x0)
    torch.testing.assert_close(diffused.noise_cond, 999 * s)
    shifted = flow_process(shift=3.0).diffuse(x0, noise, 1 - u)
    torch.testing.assert_close(shifted.noise_cond, 1000 * 3 * u / (1 + 2 * u))


side = st.integers(1, 4)
shapes = st.one_of(  # B C H W, B C T H W, B N C, B C
    st.tuples(side, side, side, side),
    st.tuples(side, side, side, side, side),
    st.tuples(side, side, side),
    st.tuples(side, side),
)


@given(shapes, st.sampled_from(sorted(TARGETS)), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_a_sample_has_the_loss_that_it_has_alone_and_flattened(shape, target, masked, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise, guess = torch.randn(3, *shape, generator=generator)
    uniform, mask = torch.rand(shape[0], generator=generator), torch.rand(shape, generator=generator) + 0.1
    shifts = torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
    process = discrete_process("linear", target, offset_noise=0.1 if offset else 0.0)

    def loss_of(rows: slice) -> DenoisingLoss:
        offsets = shifts[rows] if offset else None
        diffused = process.diffuse(x0[rows], noise[rows], uniform[rows], offset=offsets)
        return process.loss(diffused, guess[rows], mask[rows] if masked else None)

    whole = loss_of(slice(None))
    diffused = process.diffuse(x0, noise, uniform, offset=shifts if offset else None)
    for i in range(shape[0]):
        a, b = (weight.item() for weight in VPScaler()(whole.logsnr[i]))
        epsilon = noise[i] + 0.1 * shifts[i] if offset else noise[i]
        torch.testing.assert_close(diffused.noised[i], a * x0[i] + b * epsilon, atol=1e-5, rtol=1e-5)
        answer = {"epsilon": epsilon, "x0": x0[i], "v": a * epsilon - b * x0[i], "rectified_flows": epsilon - x0[i]}
        squared = (guess[i] - answer[target]).square()
        expected = (squared * mask[i]).mean() / mask[i].mean() if masked else squared.mean()
        torch.testing.assert_close(whole.raw[i], expected, atol=1e-5, rtol=1e-4)
        one = loss_of(slice(i, i + 1))
        torch.testing.assert_close(one.loss[0], whole.loss[i], atol=1e-6, rtol=1e-5)
    assert whole.loss.shape == whole.raw.shape == (shape[0],)
