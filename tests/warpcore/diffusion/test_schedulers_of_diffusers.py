"""Every sampler along its published times draws what diffusers' scheduler draws, whatever the number of steps."""

import diffusers
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from warpcore.diffusion.processes import discrete_process
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.diffusion.times import TIME_RULES, Steps, sampling_times
from warpcore.errors import UserError

SHAPE = (2, 4, 3, 3)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ALL, LEADING = ("leading", "trailing", "linspace"), ("leading",)
SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}, LEADING),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, LEADING),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, LEADING),
    "euler": (diffusers.EulerDiscreteScheduler, {}, ALL),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, ALL),
    "heun": (diffusers.HeunDiscreteScheduler, {}, ALL),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}, ALL),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, ALL),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, ALL),
}
"""The scheduler, its settings, and the spacings of which its steps end where the next begin."""
WITH_KARRAS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")


def network(x: Tensor, t: Tensor) -> Tensor:
    """A made-up one, of a value and slope such as a real one's."""
    weights = torch.arange(1, 5, dtype=x.dtype)[:, None, None] / 3
    return (x * weights).sin() + 0.2 * (t.to(x.dtype)[:, None, None, None] / 300).cos()


def drawn_by_diffusers(scheduler, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The latents at the start, with variance 1, and at the end."""
    scheduler.set_timesteps(steps)
    assume(scheduler.timesteps[-1] >= 0)  # of some numbers of steps, their trailing timesteps are one too many
    x = first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    if hasattr(scheduler, "is_scale_input_called") or isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    generator = torch.Generator().manual_seed(seed + 1)
    random = isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler | diffusers.DDPMScheduler)
    random = random or getattr(scheduler.config, "algorithm_type", "").startswith("sde")
    for t in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(prediction, t, x, **({"generator": generator} if random else {})).prev_sample
    return first, x


@st.composite
def drawings(draw):
    sampler = draw(st.sampled_from(sorted(SCHEDULERS)))
    spacing = draw(st.sampled_from(SCHEDULERS[sampler][2]))
    karras = sampler in WITH_KARRAS and draw(st.booleans())
    targets = ["epsilon"] if sampler == "pndm" else ["epsilon", "v"]  # theirs extrapolates v, not the noise it means
    return sampler, spacing, karras, draw(st.sampled_from(targets)), draw(st.integers(2, 60))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(drawings(), st.integers(0, 1000))
def test_a_drawing_is_that_of_diffusers(drawing, seed):
    sampler, spacing, karras, target, steps = drawing
    kind, own, _ = SCHEDULERS[sampler]
    own = own | {"use_karras_sigmas": True} if karras else own
    prediction = "epsilon" if target == "epsilon" else "v_prediction"
    scheduler = kind(**SCHEDULE, **own, timestep_spacing=spacing, prediction_type=prediction)
    first, expected = drawn_by_diffusers(scheduler, steps, seed)

    process = discrete_process(target=target, fractional_timesteps=TIME_RULES[sampler].fractional)
    times = sampling_times(process.schedule, steps, sampler, spacing=spacing, karras=karras)
    noise = torch.Generator().manual_seed(seed + 1)
    *_, (_, found, _) = process.sample(
        network,
        {},
        first,
        sampler=SAMPLERS[sampler](process.input_scaler),
        steps=Steps(times=times),
        noise=lambda step: torch.randn(SHAPE, generator=noise),
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_karras_sigmas_with_whole_timesteps_are_refused():
    with pytest.raises(UserError, match="karras: pndm steps along whole timesteps; Karras sigmas go with euler"):
        sampling_times(discrete_process().schedule, 20, "pndm", karras=True)
