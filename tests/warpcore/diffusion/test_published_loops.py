"""The samplers of DiT, PixArt-alpha and Open-Sora 1.0, step by step against their published loops."""

import pytest
import torch
from torch import Tensor

from tests.golden import load_case, resolve
from tests.small_stdit import SmallSTDiT
from warpcore.diffusion.guidance import Guidance, pair_conditions
from warpcore.diffusion.processes import discrete_process
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.diffusion.times import Steps, respaced_timesteps, sampling_times
from warpcore.errors import UserError

IDDPM, IDDPM_TENSORS = load_case("opensora/iddpm_sampling")
SOLVER, SOLVER_TENSORS = load_case("opensora/dpm_solver_sampling")


def texts(given: dict, network: SmallSTDiT) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The conditions of a case and those of the empty text, which is masked like the prompt."""
    empty = network.weights["y_embedder.y_embedding"].expand_as(given["y"])
    return {"y": given["y"], "mask": given["text_mask"]}, {"y": empty, "mask": given["text_mask"]}


@pytest.mark.parametrize("call", IDDPM["calls"][:2], ids=lambda call: call["name"])
def test_iddpm_takes_every_step_of_the_reference(call):
    network = SmallSTDiT(load_case("opensora/iddpm_small_network")[0])
    given, draws, expected = (resolve(call[key], IDDPM_TENSORS) for key in ("kwargs", "noise_draws", "result"))
    told, untold = texts(given, network)
    diffusion, settings = discrete_process("linear", learned_variance=True), call["scheduler"]
    steps = diffusion.sample(
        network, told, given["z"], unconditional=untold, sampler=DIT_SAMPLERS["iddpm"](diffusion.input_scaler),
        steps=Steps(times=sampling_times(diffusion.schedule, settings["num_sampling_steps"], "iddpm")),
        guidance=Guidance(settings["cfg_scale"], rho=0.0, channels=settings.get("cfg_channel")),
        noise=lambda step: draws[step][: len(given["z"])],
    )  # fmt: skip
    found = torch.stack([x for _, x, _ in steps])
    wanted = torch.cat([expected["input_of_each_step"][1:], expected["final"][None]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=call["result_stats"]["suggested_atol"])


def test_iddpm_with_given_frames_takes_every_step_of_the_reference():
    """A frame whose mask is m joins at timestep m * 1000, noised to it, and is given before: it stays as it was."""
    call = next(call for call in IDDPM["calls"] if call["name"] == "masked")
    network = SmallSTDiT(load_case("opensora/iddpm_small_network")[0])
    given, draws, expected = (resolve(call[key], IDDPM_TENSORS) for key in ("kwargs", "noise_draws", "result"))
    told, untold = texts(given, network)
    pairs, draws = pair_conditions(told, untold, len(given["z"])), iter(draws)
    diffusion, number = discrete_process("linear", learned_variance=True), call["scheduler"]["num_sampling_steps"]
    sampler, guidance = (
        DIT_SAMPLERS["iddpm"](diffusion.input_scaler),
        Guidance(call["scheduler"]["cfg_scale"], rho=0.0),
    )
    logsnrs = diffusion.schedule(sampling_times(diffusion.schedule, number, "iddpm"))
    sampler.start(logsnrs)
    joins = (given["mask"] * number).int()
    clean = x = given["z"]
    for step in range(number):
        now, after = logsnrs[step : step + 2, None].float().expand(-1, len(x))
        a, b = diffusion.input_scaler.weights(now, x)
        left, frames = number - 1 - step, (slice(None), None, slice(None), None, None)
        x = torch.where((joins == left)[frames], a * clean + b * next(draws)[: len(x)], x)
        torch.testing.assert_close(
            x, expected["input_of_each_step"][step], rtol=0, atol=call["result_stats"]["suggested_atol"]
        )
        r = diffusion.noise_cond(now)
        both = network(x.repeat(2, 1, 1, 1, 1), r.repeat(2), **pairs, noised=(joins > left).repeat(2, 1))
        found, variance = diffusion.variance.split(both, x.shape[1])
        pred = guidance.combine(*found.chunk(2), guidance.scale)
        x0, epsilon = diffusion.undiffuse(x, now, pred)
        draw = next(draws)[: len(x)]
        reached = sampler.step(x, x0, epsilon, now, after, noise=lambda draw=draw: draw, variance=variance[: len(x)])
        x = torch.where((joins < left)[frames], x, reached)
    torch.testing.assert_close(x, expected["final"], rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("call", SOLVER["calls"], ids=lambda call: call["name"])
def test_dpm_solver_takes_every_step_of_the_reference(call):
    network, given = SmallSTDiT(SOLVER), resolve(call["kwargs"], SOLVER_TENSORS)
    expected, asked = resolve(call["result"], SOLVER_TENSORS), []

    def recorded(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        asked.append(t[0])
        return network(x, t, **conditions)

    told, untold = texts(given, network)
    diffusion = discrete_process("linear", learned_variance=True, fractional_timesteps=True)
    settings = call["scheduler"]
    steps = diffusion.sample(
        recorded, told, given["z"], unconditional=untold, sampler=DIT_SAMPLERS["dpm-solver"](diffusion.input_scaler),
        steps=Steps(times=sampling_times(diffusion.schedule, settings["num_sampling_steps"], "dpm-solver")),
        guidance=Guidance(settings["cfg_scale"], rho=0.0),
    )  # fmt: skip
    found = torch.stack([x for _, x, _ in steps])
    wanted = torch.cat([expected["input_of_each_step"][1:], expected["final"][None]])
    torch.testing.assert_close(torch.stack(asked), expected["network_times"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("call", load_case("opensora/iddpm_tables")[0]["calls"][1:], ids=lambda call: call["name"])
def test_respaced_timesteps_are_those_of_the_reference(call):
    kept = call["timestep_map"]
    assert respaced_timesteps(str(len(kept))).tolist() == [*reversed(kept), -1]


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        ("ddim4", [75, 50, 25, 0]),
        ("ddim3", [68, 34, 0]),
        ("1", [0]),
        ("2,3", [99, 74, 50, 49, 0]),
        ("1,1,2", [99, 67, 34, 0]),
    ],
)
def test_timesteps_are_respaced_in_parts_and_by_whole_strides(respacing, expected):
    assert respaced_timesteps(respacing, 100).tolist() == [*expected, -1]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim60", "no whole stride takes 60 of 100 timesteps"),
        ("ddim", "'ddim'; write a number, numbers such as 10,15,20, or ddim25"),
        ("10,60", "60 of 50 timesteps; write a number from 1 to 50"),
        ("0", "0 of 100 timesteps"),
    ],
)
def test_impossible_respacings_are_refused(respacing, message):
    with pytest.raises(UserError, match=message):
        respaced_timesteps(respacing, 100)


def test_ddim_of_dit_takes_equal_whole_steps_from_the_first_timestep():
    table = discrete_process("linear").schedule
    assert torch.equal(sampling_times(table, 20, "ddim"), respaced_timesteps("ddim20"))
    assert sampling_times(discrete_process().schedule, 20, "ddim")[[0, -2, -1]].tolist() == [951, 1, 0]
