"""Times, single steps and whole loops of samplers against the golden cases, which diffusers' schedulers computed."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from families.common.library_networks import adapt
from tests.golden import FOLDER, load_case, resolve, weights_of
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.noise_conditions import TimestepNoiseCond
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.samplers import SAMPLERS, DDIMSampler, Sampler
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.times import TIME_RULES, Steps, flow_times, leading_timesteps, sampling_times

NAMES = {
    "PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral", "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}  # fmt: skip
STEPS, STEP_TENSORS = load_case("sd_t5/sampler_steps")
LOOPS, LOOP_TENSORS = load_case("sd_t5/sampling_loops")


def golden_times() -> list[dict]:
    return json.loads((FOLDER / "sd_t5" / "sampling_times.json").read_text())["rows"]


def process_of(scheduler: dict) -> GDF:
    """The diffusion process of a scheduler of diffusers."""
    settings = scheduler["kwargs"]
    if scheduler["class"].startswith("Flow"):
        return flow_process(shift=settings.get("shift", 1.0))
    zero_snr = settings.get("rescale_betas_zero_snr", False)
    process = discrete_process(
        target="v" if settings.get("prediction_type") == "v_prediction" else "epsilon",
        zero_terminal_snr=zero_snr,
        fractional_timesteps=TIME_RULES[NAMES[scheduler["class"]]].fractional,
    )
    if zero_snr and NAMES[scheduler["class"]] == "euler":  # there sigma is infinite; they take a large one
        table = process.schedule.alphas_cumprod
        table[-1] = 2**-24
        process.schedule = TableSchedule(table)
        process.noise_cond = TimestepNoiseCond(process.schedule, fractional=True)
    return process


def sampler_of(call: dict, process: GDF) -> Sampler:
    if call["object"]["class"].startswith("Flow"):
        return SAMPLERS["euler"](process.input_scaler)
    if "eta" in call["step_kwargs"]:
        return DDIMSampler(process.input_scaler, eta=call["step_kwargs"]["eta"])
    sde = call["object"]["kwargs"].get("algorithm_type") == "sde-dpmsolver++"
    return SAMPLERS["dpmpp_2m_sde" if sde else NAMES[call["object"]["class"]]](process.input_scaler)


def times_of(kind: str, settings: dict, steps: int, process: GDF) -> Tensor:
    if kind.startswith("Flow"):
        return flow_times(steps, shift=settings.get("shift", 1.0))
    if kind == "DDPMScheduler":  # it starts at 0, as DDPM's authors did, not at 1 as Stable Diffusion does
        return leading_timesteps(steps)
    spacing = None if settings.get("use_karras_sigmas") else settings.get("timestep_spacing")
    return sampling_times(
        process.schedule, steps, NAMES[kind], spacing=spacing, karras=settings.get("use_karras_sigmas", False)
    )


@pytest.mark.parametrize("row", golden_times(), ids=lambda row: f"{row['class']} {row['steps']}")
def test_times_and_sigmas(row):
    process = process_of(row)
    times = times_of(row["class"], row["kwargs"], row["steps"], process)
    order = SAMPLERS[NAMES.get(row["class"], "euler")](process.input_scaler).start(process.schedule(times))
    logsnr = process.schedule(times)
    asked = process.noise_cond(logsnr)[order[:-1]].double()
    torch.testing.assert_close(asked, torch.tensor(row["timesteps"], dtype=torch.float64), rtol=1e-5, atol=1e-4)
    if "sigmas" in row:
        _, b = process.input_scaler(logsnr)
        sigmas = b if row["class"].startswith("Flow") else (-logsnr / 2).exp()
        torch.testing.assert_close(sigmas, torch.tensor(row["sigmas"], dtype=torch.float64), rtol=1e-5, atol=1e-6)


def given(call: dict) -> dict[str, Tensor]:
    return {key: resolve(call[key], STEP_TENSORS) for key in ("model_outputs", "noise_draws", "samples", "timesteps")}


def is_along_its_times(call: dict) -> bool:
    """Whether a step ends where the next begins. Those of diffusers' DDIM are of a whole number of timesteps: where it
    does not divide 1,000 by their number, trailing timesteps are not where its steps end."""
    return call["name"] != "ddim_v_zero_snr_trailing"


@pytest.mark.parametrize("call", filter(is_along_its_times, STEPS["calls"]), ids=lambda call: call["name"])
def test_all_steps_with_given_predictions(call):
    predictions, draws, expected, timesteps = given(call).values()
    process = process_of(call["object"])
    times = times_of(call["object"]["class"], call["object"]["kwargs"], call["steps"], process)
    tolerance = {"rtol": call["suggested_rtol"], "atol": call["suggested_atol"]}
    if call["object"]["class"].startswith("Euler"):  # a * x0 + b * epsilon over a, there
        a, _ = process.input_scaler(process.schedule(times).float())
        expected = expected * a.view(-1, 1, 1, 1, 1)
    if call["object"]["kwargs"].get("rescale_betas_zero_snr"):
        tolerance["atol"] = 1e-4  # their products of 1,000 numbers in float32 are off by 3e-5
    answers, asked = iter(predictions), []

    def network(x, t):
        asked.append(t[0].item())
        return next(answers)

    sampler = sampler_of(call, process)
    steps = process.sample(
        network, {}, expected[0], sampler=sampler, steps=Steps(times=times), noise=draws.__getitem__
    )
    for (_, x, _), wanted in zip(steps, expected[1:], strict=True):
        torch.testing.assert_close(x, wanted, **tolerance)
    assert asked == pytest.approx(timesteps.tolist(), rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("call", [call for call in STEPS["calls"] if not is_along_its_times(call)])
def test_each_step_from_a_given_sample(call):
    predictions, _, expected, timesteps = given(call).values()
    process = process_of(call["object"])
    sampler = sampler_of(call, process)
    for step, timestep in enumerate(timesteps):
        ends = torch.stack([timestep, timestep - 1000 // call["steps"]])
        logsnr, logsnr_next = process.schedule(ends).float()[:, None].expand(-1, 2)
        x0, epsilon = process.undiffuse(expected[step], logsnr, predictions[step])
        x = sampler.step(expected[step], x0, epsilon, logsnr, logsnr_next)
        torch.testing.assert_close(x, expected[step + 1], rtol=call["suggested_rtol"], atol=call["suggested_atol"])


@pytest.mark.parametrize("call", LOOPS["calls"], ids=lambda call: call["name"])
def test_whole_loops_of_a_small_network_with_guidance(call):
    spec, tensors = load_case("sd_t5/unet_sd15_small")
    network = UNet2DConditionModel(**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors))
    noise, cond, uncond, expected = (
        resolve(call[key], LOOP_TENSORS) for key in ("noise", "cond", "uncond", "samples")
    )
    process = process_of(call["object"])
    times = times_of(call["object"]["class"], call["object"]["kwargs"], call["steps"], process)
    if call["object"]["class"].startswith("Euler"):
        a, _ = process.input_scaler(process.schedule(times).float())
        expected = expected * a[1:].view(-1, 1, 1, 1, 1)
    steps = process.sample(
        adapt(network),
        {"encoder_hidden_states": cond},
        noise,
        unconditional={"encoder_hidden_states": uncond},
        sampler=sampler_of(call | {"step_kwargs": {}}, process),
        steps=Steps(times=times),
        guidance=Guidance(call["guidance"], rho=0.0),
    )
    found = torch.stack([x for _, x, _ in steps])
    torch.testing.assert_close(found, expected, rtol=call["suggested_rtol"], atol=call["suggested_atol"])
