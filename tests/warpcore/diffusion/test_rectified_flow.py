"""Rectified flow with times by the size of clips, as Open-Sora 1.2 trains and draws: against recorded numbers."""

import math

import pytest
import torch
from torch import Tensor

from modules.stdit3 import STDiT3
from tests.golden import load_case, resolve, weights_of
from warpcore.diffusion.given_frames import GivenFrames
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.processes import flow_process
from warpcore.diffusion.samplers import SAMPLERS, DDIMSampler
from warpcore.diffusion.schedules import shift_by_size
from warpcore.diffusion.times import Steps

ROWS = load_case("opensora/rflow_timestep_transform")[0]["rows"]
TRAINING, TRAINING_TENSORS = load_case("opensora/rflow_training")
SAMPLING, SAMPLING_TENSORS = load_case("opensora/rflow_sampling")


def small_network() -> STDiT3:
    spec, tensors = load_case("opensora/rflow_small_network")
    network = STDiT3(**spec["constructor"])
    network.load_state_dict(weights_of(spec, tensors, computed={"rope.freqs": network.rope.freqs}))
    return network


def shift_of(given: dict[str, Tensor], scale: float = 1.0) -> Tensor:
    """(B,) of the sizes that a case gives; 17 frames have 5 latents."""
    return shift_by_size(given["height"], given["width"], given["num_frames"] // 17 * 5, scale)


def test_times_by_size_are_those_of_the_reference():
    usual = [row for row in ROWS if row["num_frames"] == 1 or row["num_frames"] >= 17]
    assert len(usual) > 20
    given = {key: torch.tensor([row[key] for row in usual]) for key in ("height", "width", "num_frames", "t")}
    logsnr = flow_process().schedule(given["t"].double() / 1000, shift=shift_of(given))
    expected = torch.tensor([row["result"] for row in usual]).double()
    torch.testing.assert_close(1000 * (-logsnr / 2).sigmoid(), expected, rtol=1e-5, atol=1e-3)


def test_clips_shorter_than_a_window_have_the_times_of_one_latent_where_the_reference_has_none():
    short = next(row for row in ROWS if row["num_frames"] == 16 and row["t"] == 500)
    assert short["result"] == 0
    size = torch.tensor([short["height"]]), torch.tensor([short["width"]])
    assert torch.equal(shift_by_size(*size, torch.tensor([0])), shift_by_size(*size, torch.tensor([1])))


def uniform_draws(call: dict) -> dict[str, Tensor]:
    """What `diffuse` is given for the recorded draws of a case."""
    if "normal_draw" in call:
        return {"uniform": torch.special.ndtr(resolve(call["normal_draw"], TRAINING_TENSORS).double())}
    if "integer_draw" in call:
        return {"t": resolve(call["integer_draw"], TRAINING_TENSORS).double() / 1000}
    return {"t": resolve(call["uniform_draw"], TRAINING_TENSORS).double()}


@pytest.mark.parametrize("call", TRAINING["calls"], ids=lambda call: call["name"])
@torch.no_grad()
def test_losses_are_those_of_the_reference(call):
    settings, (x0,) = call["scheduler"], resolve(call["args"], TRAINING_TENSORS)
    given, expected = (resolve(call[key], TRAINING_TENSORS) for key in ("kwargs", "result"))
    conditions = given["model_kwargs"]
    diffusion = flow_process(
        logit_normal=settings.get("sample_method") == "logit-normal", logit_mean=settings.get("loc", 0.0),
        logit_std=settings.get("scale", 1.0), signalwards=True,
    )  # fmt: skip
    shift = shift_of(conditions, settings.get("transform_scale", 1.0)) if "use_timestep_transform" in settings else 1.0
    diffused = diffusion.diffuse(x0, given["noise"], shift=shift, **uniform_draws(call))
    mask = given.get("mask")
    if mask is not None:
        mask = mask[:, None, :, None, None]
        diffused = diffused._replace(noised=torch.where(mask, diffused.noised, x0.double()))
    torch.testing.assert_close(diffused.noise_cond.float(), expected["t"], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(diffused.noised.float(), expected["x_t"], rtol=0, atol=1e-4)
    sizes = {key: conditions.get(key) for key in ("mask", "fps", "height", "width", "x_mask")}
    found = small_network()(diffused.noised.float(), diffused.noise_cond.float(), conditions["y"][:, 0], **sizes)
    loss = diffusion.loss(diffused, found[:, : x0.shape[1]], None if mask is None else mask.float()).loss
    torch.testing.assert_close(loss.float(), expected["loss"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", SAMPLING["calls"][:3], ids=lambda call: call["name"])
def test_drawing_takes_every_step_of_the_reference(call):
    network, settings = small_network(), call["scheduler"]
    given, expected = (resolve(call[key], SAMPLING_TENSORS) for key in ("kwargs", "result"))
    sizes = {key: given["additional_args"][key] for key in ("fps", "height", "width")} | {"mask": given["text_mask"]}
    text = given["y"][:, 0]
    number = settings["num_sampling_steps"]
    times = torch.linspace(1, 0, number + 1, dtype=torch.float64)
    if settings.get("use_discrete_timesteps"):
        times = (times * 1000).round() / 1000
    shift = shift_of(given["additional_args"])[0].item() if settings.get("use_timestep_transform") else 1.0
    steps = flow_process(signalwards=True).sample(
        lambda x, r, **conditions: network(x.float(), r.float(), **conditions)[:, : x.shape[1]].double(),
        {"y": text, **sizes}, given["z"].double(),
        unconditional={"y": network.y_embedder.y_embedding.expand_as(text), **sizes},
        guidance=Guidance(settings["cfg_scale"], rho=0.0), steps=Steps(times=times, shift=shift),
    )  # fmt: skip
    found = torch.stack([x for _, x, _ in steps]).float()
    wanted = torch.cat([expected["input_of_each_step"][1:], expected["final"][None]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=call["result_stats"]["suggested_atol"])


def test_drawing_with_given_frames_takes_every_step_of_the_reference():
    call = next(call for call in SAMPLING["calls"] if call["name"] == "masked")
    network, settings = small_network(), call["scheduler"]
    given, expected, draws = (resolve(call[key], SAMPLING_TENSORS) for key in ("kwargs", "result", "noise_draws"))
    sizes = {key: given["additional_args"][key] for key in ("fps", "height", "width")} | {"mask": given["text_mask"]}
    text, diffusion, masks = given["y"][:, 0], flow_process(signalwards=True), []
    sampler = GivenFrames(DDIMSampler(diffusion.input_scaler), given["mask"])

    def predict(x: Tensor, r: Tensor, **conditions: Tensor) -> Tensor:
        masks.append(sampler.noised)
        found = network(x.float(), r.float(), x_mask=sampler.noised.repeat(2, 1), **conditions)
        return found[:, : x.shape[1]].double()

    shift = shift_of(given["additional_args"])[0].item()
    steps = diffusion.sample(
        predict, {"y": text, **sizes}, given["z"].double(), sampler=sampler,
        unconditional={"y": network.y_embedder.y_embedding.expand_as(text), **sizes},
        guidance=Guidance(settings["cfg_scale"], rho=0.0), noise=lambda step: draws[step + 1],
        steps=Steps(times=torch.linspace(1, 0, settings["num_sampling_steps"] + 1, dtype=torch.float64), shift=shift),
    )  # fmt: skip
    found = torch.stack([x for _, x, _ in steps]).float()
    assert torch.equal(torch.stack(masks), expected["x_mask_of_each_step"])
    wanted = torch.cat([expected["input_of_each_step"][1:], expected["final"][None]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=call["result_stats"]["suggested_atol"])
    kept = given["mask"] == 0
    assert torch.equal(found[-1].transpose(1, 2)[kept], given["z"].transpose(1, 2)[kept])


def test_frames_cannot_join_steps_that_are_asked_about_twice():
    scaler = flow_process().input_scaler
    with pytest.raises(ValueError, match="HeunSampler asks twice about a step"):
        GivenFrames(SAMPLERS["heun"](scaler), torch.ones(1, 2)).start(torch.tensor([-1.0, 0.0, 1.0]))


def test_a_flow_towards_the_signal_is_the_other_one_with_its_sign_turned():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    here, there = flow_process(), flow_process(signalwards=True)
    given = x0, noise, torch.tensor([0.3, 0.8])
    ours, theirs = here.diffuse(*given), there.diffuse(*given)
    assert torch.equal(theirs.target, -ours.target)
    assert torch.equal(theirs.noised, ours.noised)
    for one, other in zip(
        here.undiffuse(ours.noised, ours.logsnr, ours.target),
        there.undiffuse(ours.noised, ours.logsnr, theirs.target), strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


def test_each_sample_has_its_own_shift():
    schedule, t = flow_process().schedule, torch.tensor([0.2, 0.7])
    found = schedule(t, shift=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found[0], schedule(t)[0])
    torch.testing.assert_close(found[1], schedule(t, shift=3.0)[1])
    assert found[1] - schedule(t)[1] == pytest.approx(-2 * math.log(3), abs=1e-5)
