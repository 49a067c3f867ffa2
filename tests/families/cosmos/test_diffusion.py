"""Noise, loss and sampling against the reference: recorded draws, single steps, whole runs."""

import pytest
import torch
from torch import Tensor

from families.cosmos.sampling import DISTILLED_SIGMAS, draw, published_noise, sigmas
from tests.families.cosmos.small import TEXT, golden_network
from tests.golden import load_case, resolve
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.processes import flow_process
from warpcore.diffusion.samplers import RES2MSampler
from warpcore.diffusion.times import Steps, flow_sigma_times, karras_sigmas


def process(loss_weight: str = "constant") -> GDF:
    return flow_process(loss_weight, steps=1, logit_normal=True)


def logsnr(sigma: Tensor) -> Tensor:
    return -2 * sigma.log()


def test_noise_levels_of_training_are_the_published_ones():
    _, tensors = load_case("cosmos/sigma_sampling")
    t = process().schedule.training_t(tensors["in.uniform"])
    torch.testing.assert_close((t / (1 - t)).float(), tensors["out.sigma"].flatten(), rtol=2e-6, atol=0)


def test_a_draw_of_zero_is_a_finite_noise_level():
    times = process().schedule.training_t(torch.tensor([0.0, 1 - 2.0**-24]))
    assert ((times > 0) & (times < 1)).all()


def test_input_output_and_time_are_scaled_as_published():
    """c_skip = c_in = 1 - t, c_out = -t, c_noise = t: those of a straight flow."""
    _, tensors = load_case("cosmos/scaling")
    sigma = tensors["in.sigma"].flatten()
    diffusion = process()
    a, b = diffusion.input_scaler(logsnr(sigma))
    found = {"c_skip": a, "c_in": a, "c_out": -b, "c_noise": diffusion.noise_cond(logsnr(sigma))}
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"out.default.{name}"].flatten(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mean", "sum", "dropped"])
def test_loss_and_gradients_are_those_of_the_published_training(name):
    network, spec, tensors = golden_network("training_step")
    call = next(call for call in spec["calls"] if call["name"] == name)
    given, scale = resolve(call["kwargs"], tensors), call["kwargs"]["loss_scale"]
    keep = tensors[f"in.{name}.keep_text"].view(-1, 1, 1)
    diffusion = process()
    t = diffusion.schedule.training_t(tensors[f"in.{name}.uniform"].double()).float()
    torch.testing.assert_close(t / (1 - t), tensors[f"in.{name}.sigma"].flatten(), rtol=1e-5, atol=0)
    x0, noise = (value[:, :, 0] for value in (given["x0"], tensors[f"in.{name}.epsilon"]))
    diffused = diffusion.diffuse(x0, noise, t=t)
    shown = tensors[f"out.{name}.xt_times_c_in"][:, :, 0]
    torch.testing.assert_close(diffused.noised, shown, rtol=1e-5, atol=1e-5)
    made = network(diffused.noised, diffused.noise_cond, **{TEXT: given["text"] * keep})
    found, _ = diffusion.undiffuse(diffused.noised, diffused.logsnr, made)
    torch.testing.assert_close(found, tensors[f"out.{name}.x0_pred"][:, :, 0], rtol=0, atol=1e-4)

    factor = scale * (x0.shape[1] if call["kwargs"]["loss_reduce"] == "sum" else 1)
    losses = factor * diffusion.loss(diffused, made).loss
    (losses.mean()).backward()
    assert losses.mean().item() == pytest.approx(call["result"]["loss"], rel=1e-5)
    parameters = {f"transformer.{own}": parameter for own, parameter in network.named_parameters()}
    norm = torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm()
    assert norm.item() == pytest.approx(call["gradient_norm"], rel=1e-4)
    older = process("snr_plus_one").loss_weight(diffused.logsnr)
    torch.testing.assert_close(older, t**2 + (1 - t) ** 2, rtol=1e-5, atol=0)


def gradient_names() -> dict[str, str]:
    from families.cosmos.original_names import library_tensors

    _, tensors = load_case("cosmos/training_step")
    prefix = "grad.mean."
    own = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    return {name: next(iter(library_tensors({name: torch.zeros(1)}))) for name in own}


@pytest.mark.parametrize("name", ["mean", "sum", "dropped"])
def test_single_gradients_are_those_of_the_published_training(name):
    network, spec, tensors = golden_network("training_step")
    call = next(call for call in spec["calls"] if call["name"] == name)
    given = resolve(call["kwargs"], tensors)
    diffusion, keep = process(), tensors[f"in.{name}.keep_text"].view(-1, 1, 1)
    sigma = tensors[f"in.{name}.sigma"].flatten()
    x0, noise = (value[:, :, 0] for value in (given["x0"], tensors[f"in.{name}.epsilon"]))
    diffused = diffusion.diffuse(x0, noise, t=sigma / (1 + sigma))
    made = network(diffused.noised, diffused.noise_cond, **{TEXT: given["text"] * keep})
    factor = given["loss_scale"] * (x0.shape[1] if given["loss_reduce"] == "sum" else 1)
    (factor * diffusion.loss(diffused, made).loss.mean()).backward()
    parameters = dict(network.named_parameters())
    for original, library in gradient_names().items():
        expected = tensors[f"grad.{name}.{original}"]
        found = parameters[library].grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("steps", [4, 10, 20, 35])
def test_noise_levels_of_sampling_are_the_published_ones(steps):
    _, tensors = load_case("cosmos/sampler_steps")
    torch.testing.assert_close(sigmas(steps), tensors[f"out.sigmas.default.{steps}"], rtol=1e-12, atol=0)
    other = karras_sigmas(steps, 200.0, 0.01, rho=5.0)
    torch.testing.assert_close(other, tensors[f"out.sigmas.other.{steps}"], rtol=1e-12, atol=0)


def test_single_steps_of_the_sampler_are_those_of_the_reference():
    """Its samples are x0 + sigma epsilon; here they are divided by 1 + sigma, the flow's (1 - t) x0 + t epsilon."""
    spec, tensors = load_case("cosmos/sampler_steps")
    compared = 0
    for call in spec["calls"]:
        if call["method"] != "step":
            continue
        given, steps = resolve(call["kwargs"], tensors), call["before"][0]["args"][0]
        levels, place, x = sigmas(steps), given["i"], given["sample"].double()
        sampler, many = RES2MSampler(process().input_scaler), len(x)
        sampler.start(logsnr(levels))

        def step(i: int, x: Tensor, x0: Tensor, sampler=sampler, levels=levels, many=many) -> Tensor:
            here, there = (logsnr(levels[n]).expand(many) for n in (i, i + 1))
            return sampler.step(x / (1 + levels[i]), x0, x0, here, there) * (1 + levels[i + 1])

        if place:
            step(place - 1, x, given["x0_prev"].double())  # what it remembers is only x0
        found = step(place, x, given["x0_pred"].double())
        expected, stats = resolve(call["result"], tensors)["tuple"][0], call["result_stats"]
        atol = stats["suggested_atol"]
        torch.testing.assert_close(found.float(), expected, rtol=stats["suggested_rtol"], atol=atol)
        compared += 1
    assert compared > 5


def conditions(call: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict]:
    given = resolve(call["kwargs"], tensors)
    negative = given.get("negative_text")
    return {TEXT: given["text"]}, {TEXT: torch.zeros_like(given["text"]) if negative is None else negative}


@pytest.mark.parametrize("name", ["guided", "negative_prompt", "unguided", "default_35"])
@torch.no_grad()
def test_a_whole_drawing_is_that_of_the_reference_for_the_same_seed(name):
    network, spec, tensors = golden_network("sampling")
    call = next(call for call in spec["calls"] if call["name"] == name)
    given, (told, untold) = call["kwargs"], conditions(call, tensors)
    shape = (16, given["height"] // 8, given["width"] // 8)
    noise = published_noise([given["seed"]], shape)
    torch.testing.assert_close(noise, tensors[f"in.{name}.noise"][:, :, 0], rtol=0, atol=0)
    theirs = given["guidance"]
    found = draw(
        process(), network, told, untold, shape, [given["seed"]], steps=given["num_sampling_step"], sampler="res_2m",
        guidance=theirs + 1 if theirs else None, initial_noise=noise,
    )  # fmt: skip
    atol = call["result_stats"]["suggested_atol"]
    torch.testing.assert_close(found, tensors[f"out.{name}"][:, :, 0], rtol=0, atol=atol)


@torch.no_grad()
def test_each_step_of_a_drawing_is_that_of_the_reference():
    network, spec, tensors = golden_network("sampling")
    call = next(call for call in spec["calls"] if call["name"] == "guided")
    told, untold = conditions(call, tensors)
    diffusion, levels = process(), sigmas(5)
    times = flow_sigma_times(levels)
    noise = tensors["in.guided.noise"][:, :, 0]
    steps = diffusion.sample(
        network, told, times[0].float() * noise, unconditional=untold, steps=Steps(times=times),
        guidance=Guidance(5.0, rho=0), sampler=RES2MSampler(diffusion.input_scaler),
    )  # fmt: skip
    for expected, (x0, x, _) in zip(call["steps"], steps, strict=False):
        theirs, atol = resolve(expected, tensors), expected["suggested_atol"]
        torch.testing.assert_close(x0, theirs["x0"][:, :, 0], rtol=0, atol=atol)
        after = levels[expected["step"] + 1].float()
        torch.testing.assert_close(x * (1 + after), theirs["latents"][:, :, 0], rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_a_distilled_network_draws_what_the_reference_does(steps, monkeypatch):
    network, spec, tensors = golden_network("sampling")
    call = next(call for call in spec["calls"] if call["name"] == f"distilled_{steps}")
    told, untold = conditions(call, tensors)
    draws = [resolve(one, tensors)[:, :, 0] for one in call["noise_draws"]]
    fresh = iter(draws[1:])
    monkeypatch.setattr(
        "warpcore.random.SampleRandom.normal", lambda self, name, *shape: next(fresh, torch.zeros(1, *shape))
    )
    found = draw(
        process(), network, told, untold, draws[0].shape[1:], [0], steps=steps, distilled=True, sampler="lcm",
        guidance=None, initial_noise=draws[0],
    )  # fmt: skip
    assert len(DISTILLED_SIGMAS[:steps]) == steps
    atol = call["result_stats"]["suggested_atol"]
    torch.testing.assert_close(found, tensors[f"out.distilled_{steps}"][:, :, 0], rtol=0, atol=atol)
