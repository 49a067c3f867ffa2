"""Samplers along explicit lists of times, against diffusers' schedulers: step by step, and over whole loops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.loss_weights import ConstantLossWeight
from warpcore.diffusion.noise_conditions import TimestepNoiseCond
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.samplers import SAMPLERS, DDIMSampler, Sampler
from warpcore.diffusion.scalers import VPScaler
from warpcore.diffusion.tables import TableSchedule, make_table
from warpcore.diffusion.targets import TARGETS
from warpcore.diffusion.times import (
    Steps,
    karras_times,
    leading_timesteps,
    linspace_timesteps,
    trailing_timesteps,
)
from warpcore.errors import UserError

STEPS = 20
SHAPE = (2, 4, 5, 3)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIR_TARGETS = {"epsilon": "epsilon", "v": "v_prediction"}


def model(x: Tensor, t: Tensor) -> Tensor:
    """A made-up network, of a value and slope such as a real one's."""
    weights = torch.arange(1, 5, dtype=x.dtype)[:, None, None] / 3
    return (x * weights).sin() + 0.2 * (t.to(x.dtype)[:, None, None, None] / 300).cos()


def process_of(table: TableSchedule, target: str, fractional: bool = False) -> GDF:
    condition = TimestepNoiseCond(table, fractional=fractional)
    return GDF(table, VPScaler(), TARGETS[target](), condition, ConstantLossWeight())


def almost_zero_snr() -> TableSchedule:
    """What diffusers' Euler and DPM-Solver++ take for zero terminal SNR, lest sigma is infinite."""
    table = make_table(zero_terminal_snr=True).alphas_cumprod
    table[-1] = 2**-24
    return TableSchedule(table)


@dataclass
class Case:
    """A scheduler of diffusers, and what is the same here."""

    scheduler: str
    settings: dict[str, Any]
    sampler: Callable[[VPScaler], Sampler]
    times: Tensor
    target: str = "epsilon"
    table: TableSchedule = field(default_factory=make_table)
    step_settings: dict[str, Any] = field(default_factory=dict)
    fractional: bool = False

    def theirs(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Latents at the start and after each step, of variance 1; predictions; the normal draws (steps, ...)."""
        kind = getattr(diffusers, self.scheduler)
        scheduler = kind(**{**SD, "prediction_type": THEIR_TARGETS[self.target], **self.settings})
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
        latents, predictions = [self._scaled(scheduler, x, 0)], []
        for i, t in enumerate(scheduler.timesteps):
            asked = scheduler.scale_model_input(x, t)
            predictions.append(model(asked, t.expand(len(x))))
            given = {**self.step_settings}
            if self.scheduler != "DPMSolverMultistepScheduler":
                given["generator"] = generator
            x = scheduler.step(predictions[-1], t, x, **given).prev_sample
            latents.append(self._scaled(scheduler, x, i + 1))
        draws = torch.Generator().manual_seed(1)
        return latents, predictions, torch.stack([torch.randn(SHAPE, generator=draws) for _ in range(STEPS)])

    def _scaled(self, scheduler, x: Tensor, step: int) -> Tensor:
        """Euler's latents are a * x0 + b * epsilon over a."""
        return x / (scheduler.sigmas[step] ** 2 + 1) ** 0.5 if self.scheduler.startswith("Euler") else x


def euler(**settings) -> dict:
    return {"scheduler": "EulerDiscreteScheduler", "settings": settings, "sampler": SAMPLERS["euler"]}


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
ZERO_SNR = {**TRAILING, "rescale_betas_zero_snr": True}
SD_DDIM = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
DPM = {"scheduler": "DPMSolverMultistepScheduler", "sampler": SAMPLERS["dpmpp_2m"]}
CASES = {
    "ddim": Case("DDIMScheduler", SD_DDIM, DDIMSampler, leading_timesteps(STEPS, offset=1, end=0)),
    "ddim v": Case("DDIMScheduler", SD_DDIM, DDIMSampler, leading_timesteps(STEPS, offset=1, end=0), "v"),
    "ddim eta 0.5": Case(
        "DDIMScheduler",
        SD_DDIM,
        lambda scaler: DDIMSampler(scaler, eta=0.5),
        leading_timesteps(STEPS, offset=1, end=0),
        step_settings={"eta": 0.5},
    ),
    "ddim v zero SNR": Case(
        "DDIMScheduler",
        {**ZERO_SNR, "clip_sample": False},
        DDIMSampler,
        trailing_timesteps(STEPS),
        "v",
        make_table(zero_terminal_snr=True),
    ),
    "ddim v zero SNR eta 0.9": Case(  # with 1, diffusers takes the root of a number that should be 0
        "DDIMScheduler",
        {**ZERO_SNR, "clip_sample": False},
        lambda scaler: DDIMSampler(scaler, eta=0.9),
        trailing_timesteps(STEPS),
        "v",
        make_table(zero_terminal_snr=True),
        {"eta": 0.9},
    ),
    "ddpm": Case("DDPMScheduler", {"clip_sample": False}, SAMPLERS["ddpm"], leading_timesteps(STEPS)),
    "ddpm v": Case("DDPMScheduler", {"clip_sample": False}, SAMPLERS["ddpm"], leading_timesteps(STEPS), "v"),
    "ddpm linear": Case(
        "DDPMScheduler",
        {"clip_sample": False, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        SAMPLERS["ddpm"],
        leading_timesteps(STEPS),
        "epsilon",
        make_table("linear"),
    ),
    "euler": Case(**euler(**LEADING), times=leading_timesteps(STEPS, offset=1)),
    "euler v": Case(**euler(**TRAILING), times=trailing_timesteps(STEPS), target="v"),
    "euler v zero SNR": Case(
        **euler(**ZERO_SNR), times=trailing_timesteps(STEPS), target="v", table=almost_zero_snr()
    ),
    "euler karras": Case(
        **euler(**LEADING, use_karras_sigmas=True),
        times=karras_times(make_table(), STEPS, first=951, last=1),
        fractional=True,
    ),
    "euler ancestral": Case(
        "EulerAncestralDiscreteScheduler", LEADING, SAMPLERS["euler_ancestral"], leading_timesteps(STEPS, offset=1)
    ),
    "euler ancestral v": Case(
        "EulerAncestralDiscreteScheduler", TRAILING, SAMPLERS["euler_ancestral"], trailing_timesteps(STEPS), "v"
    ),
    "euler ancestral as ddpm": Case(
        "EulerAncestralDiscreteScheduler", LEADING, SAMPLERS["ddpm"], leading_timesteps(STEPS, offset=1)
    ),
    "dpmpp_2m": Case(  # it leaves out the last of its timesteps, 0
        **DPM, settings={"steps_offset": 1}, times=torch.tensor([*linspace_timesteps(STEPS + 1)[:STEPS], -1])
    ),
    "dpmpp_2m v": Case(**DPM, settings=TRAILING, times=trailing_timesteps(STEPS), target="v"),
    "dpmpp_2m v zero SNR": Case(
        **DPM, settings=ZERO_SNR, times=trailing_timesteps(STEPS), target="v", table=almost_zero_snr()
    ),
    "dpmpp_2m karras": Case(**DPM, settings={"use_karras_sigmas": True}, times=karras_times(make_table(), STEPS)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_step_is_that_of_diffusers(name):
    case = CASES[name]
    latents, predictions, draws = case.theirs()
    process = process_of(case.table, case.target, case.fractional)
    logsnrs = case.table(case.times).float()[:, None].expand(-1, SHAPE[0])
    sampler = case.sampler(process.input_scaler)
    for step, (x, pred) in enumerate(zip(latents[:-1], predictions, strict=True)):
        x0, epsilon = process.undiffuse(x, logsnrs[step], pred)
        mine = sampler.step(x, x0, epsilon, logsnrs[step], logsnrs[step + 1], noise=lambda step=step: draws[step])
        torch.testing.assert_close(mine, latents[step + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_whole_loop_is_that_of_diffusers(name):
    case = CASES[name]
    latents, _, draws = case.theirs()
    process = process_of(case.table, case.target, case.fractional)
    steps = process.sample(
        model,
        {},
        latents[0],
        sampler=case.sampler(process.input_scaler),
        steps=Steps(times=case.times),
        noise=draws.__getitem__,
    )
    for (_, mine, _), theirs in zip(steps, latents[1:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_sampled_as_diffusers_does(shift):
    process = flow_process(shift=shift)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(STEPS)
    first = x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    latents = []
    for t in theirs.timesteps:
        x = theirs.step(model(x, t.expand(len(x))), t, x).prev_sample
        latents.append(x)
    sigma = theirs.sigmas.double()
    times = sigma / (shift - (shift - 1) * sigma)  # theirs have gone through the shift
    steps = process.sample(model, {}, first, sampler=SAMPLERS["euler"](process.input_scaler), steps=Steps(times=times))
    for (_, mine, _), expected in zip(steps, latents, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_the_last_steps_end_where_they_are_told():
    assert leading_timesteps(4, 100, offset=1, end=0).tolist() == [76, 51, 26, 1, 0]
    assert trailing_timesteps(4, 100).tolist() == [99, 74, 49, 24, -1]
    assert linspace_timesteps(4, 100).tolist() == [99, 66, 33, 0, -1]
    assert karras_times(make_table(steps=100), 3)[[0, -2, -1]].tolist() == pytest.approx([1.0, 0.0, -1.0])
    x0, x, _ = list(discrete_process().sample(model, {}, torch.ones(SHAPE), steps=Steps(times=[500, -1])))[-1]
    assert torch.equal(x0, x)


@pytest.mark.parametrize("times", [[3], [3, 3], [3, 4, -1], [[3, 2]]])
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(ValueError, match="two or more times that fall"):
        next(discrete_process().sample(model, {}, torch.ones(SHAPE), steps=Steps(times=times)))


def test_impossible_lists_are_refused():
    with pytest.raises(UserError, match="0 of 1000 timesteps; write a number from 1 to 1000"):
        trailing_timesteps(0)
    with pytest.raises(UserError, match="1001 of 1000 timesteps"):
        linspace_timesteps(1001)
    with pytest.raises(UserError, match="Karras sigmas need a finite largest one"):
        karras_times(make_table(zero_terminal_snr=True), 10)


def test_guidance_has_its_window_on_explicit_times():
    asked = []

    def recorder(x, t, text):
        asked.append((len(x), t[0].item()))
        return x

    steps, guidance = Steps(times=[999, 799, 400, 200, -1]), Guidance(5.0, t_start=0.8, t_stop=0.4)
    told, process = {"text": torch.ones(2, 1)}, discrete_process(target="v")
    list(process.sample(recorder, told, torch.ones(SHAPE), steps=steps, guidance=guidance))
    assert asked == [(2, 999), (4, 799), (4, 400), (2, 200)]
