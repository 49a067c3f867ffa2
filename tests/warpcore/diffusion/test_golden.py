"""Golden numbers of the diffusion framework: every recorded call on the object that the case describes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.stage_b import StageB
from modules.stage_c import StageC
from modules.unet import UNet
from tests.golden import load_case, resolve, weights_of
from warpcore.diffusion import diffusion, loss_weights, noise_conditions, samplers, scalers, schedules, targets
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.times import Steps

MODULES = (diffusion, loss_weights, noise_conditions, samplers, scalers, schedules, targets)
CLASSES = {name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, type)}

CASES = (
    "gdf_schedules",
    "gdf_scalers",
    "gdf_noise_conditions",
    "gdf_targets",
    "gdf_loss_weights",
    "gdf_adaptive_train_schedule",
    "gdf_diffuse",
    "gdf_sampler_steps",
)

# The reference ignores the keyword `clamp_range` of this class and heeds the positional argument; we heed both.
RESULT_OF = {
    "cosine_keyword_range": "cosine_positional_range",
    "cosine_keyword_range.extreme": "cosine_positional_range.extreme",
}


def build(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Like `resolve`, and an `object` description becomes an object of our class of that name."""
    if isinstance(value, dict) and "class" in value:
        args, kwargs = build(value.get("args", []), tensors), build(value.get("kwargs", {}), tensors)
        if issubclass(CLASSES[value["class"]], samplers.Sampler):  # the reference hands over the whole process
            args = [args[0].input_scaler, *args[1:]]
        return CLASSES[value["class"]](*args, **kwargs)
    if isinstance(value, dict) and "tensor" not in value:
        return {key: build(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [build(item, tensors) for item in value]
    return resolve(value, tensors)


def arguments(call: dict, tensors: dict[str, Tensor]) -> tuple[list, dict]:
    return build(call.get("args", []), tensors), build(call.get("kwargs", {}), tensors)


def run(call: dict, tensors: dict[str, Tensor]) -> Any:
    thing = build(call["object"], tensors)
    for before in call.get("before", []):
        args, kwargs = arguments(before, tensors)
        getattr(thing, before["method"])(*args, **kwargs)
    if "read" in call:
        return getattr(thing, call["read"])
    args, kwargs = arguments(call, tensors)
    if "uniform_draw" in call:  # the reference takes the number of samples and draws inside
        args = [thing.training_t(resolve(call["uniform_draw"], tensors))]
    if "eta" in kwargs:
        thing.eta = kwargs.pop("eta")
    if "noise_draws" in call:
        kwargs["noise"] = iter(resolve(call["noise_draws"], tensors)).__next__
    result = getattr(thing, call["method"])(*args, **kwargs)
    return result[:-1] if isinstance(result, diffusion.Diffused) else result  # ours ends with the clean signal


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return list(value)
    return [torch.as_tensor(value)]


def comparable(case: str, call: dict, mine: Tensor, theirs: Tensor, tensors: dict) -> tuple[Tensor, Tensor]:
    """Where we differ from the reference on purpose, what must still agree."""
    if (
        case == "gdf_targets"
        and call["name"].startswith("VPScaler.RectifiedFlowsTarget")
        and call["method"] != "__call__"
    ):
        # The reference recovers x0 and epsilon only where a + b = 1.
        return mine * (tensors["in.VPScaler.a"] + tensors["in.VPScaler.b"]), theirs
    if call["name"].startswith(("LERPScaler", "rectified_flows")) and len(mine.shape) == 1 and "in.logSNR" in tensors:
        # Its solution of a quadratic equation is off by 1e-4 at logSNR 0.
        keep = tensors["in.logSNR"] != 0
        return (mine[keep], theirs[keep]) if mine.shape == keep.shape else (mine, theirs)
    return mine, theirs


@pytest.mark.parametrize("case", CASES)
def test_every_call_gives_the_golden_result(case):
    spec, tensors = load_case(case)
    expected_of = {call["name"]: call["result"] for call in spec["calls"]}
    failed = []
    for call in spec["calls"]:
        name = call["name"]
        result, expected = run(call, tensors), resolve(expected_of[RESULT_OF.get(name, name)], tensors)
        if expected is None or result is None:
            assert result is expected, name
            continue
        stats = call["result_stats"]
        for i, (mine, theirs) in enumerate(zip(flat(result), flat(expected), strict=True)):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), f"{name}[{i}]"
            mine, theirs = comparable(case, call, mine, theirs, tensors)
            bound = stats["suggested_atol"] + stats.get("suggested_rtol", 0) * theirs.abs()
            excess = ((mine - theirs).abs() / bound).max().item()
            if not excess <= 1:
                failed.append(f"{name}[{i}]: {excess:.3g} times the tolerance")
    assert not failed, "\n".join(failed)


NETWORKS = {"stage_b_small": StageB, "stage_c_small": StageC}


@pytest.fixture(scope="module")
def networks():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to share
    made = {}
    for case, kind in NETWORKS.items():
        spec, tensors = load_case(case)
        made[case] = kind(**spec["constructor"]).eval()
        made[case].load_state_dict(weights_of(spec, tensors), strict=True)
    yield made
    torch.set_num_threads(threads)


def guidance_of(given: dict) -> Guidance | None:
    if given["cfg"] is None:
        return None
    return Guidance(given["cfg"], given.get("cfg_rho", 0.7), rescale_over_batch=True)


def steps_of(given: dict) -> Steps:
    named = {"number": "timesteps", "start": "t_start", "end": "t_end", "shift": "shift", "schedule": "schedule"}
    return Steps(**{mine: given[theirs] for mine, theirs in named.items() if theirs in given})


def sampled(call: dict, networks: dict[str, UNet], roundings: int = 0) -> dict[str, Tensor]:
    """What its first and last step give, (2, B, C, H, W); r as if the variance were some roundings larger."""
    _, tensors = load_case("gdf_sample")
    gdf = build(call["object"], tensors)
    if roundings:
        cond = gdf.noise_cond
        gdf.noise_cond = lambda logsnr: cond((logsnr.double().sigmoid() + roundings * 2**-24).logit()).float()
    (network, conditions, _), kwargs = arguments(call, tensors)
    network = networks[network["model_of_case"]]
    if "noise_draws" in call:
        draws = resolve(call["noise_draws"], tensors)
        kwargs["noise"] = lambda step: draws[step]
    unconditional, x_init = kwargs.pop("unconditional_inputs"), kwargs.pop("x_init")
    steps = gdf.sample(
        network, conditions, x_init, unconditional=unconditional, guidance=guidance_of(kwargs),
        sampler=kwargs["sampler"], noise=kwargs.get("noise"), steps=steps_of(kwargs),
    )  # fmt: skip
    x0, x, _ = zip(*steps, strict=True)
    kept = {"x0_after_first_and_last_step": x0, "x_after_first_and_last_step": x}
    return {name: torch.stack([values[0], values[-1]]) for name, values in kept.items()}


def largest(difference: Tensor) -> Tensor:
    return difference.abs().amax(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("call", load_case("gdf_sample")[0]["calls"], ids=lambda call: call["name"])
def test_sampling_loops_give_the_golden_steps(call, networks):
    _, tensors = load_case("gdf_sample")
    found, above, below = (sampled(call, networks, roundings) for roundings in (0, 1, -1))
    for name, mine in found.items():
        error = largest(mine - resolve(call["result"][name], tensors))
        # The network takes sines of 10,000 r, and builds of PyTorch round the sigmoid before r in different ways.
        rounding = torch.maximum(largest(above[name] - mine), largest(below[name] - mine))
        bound = torch.tensor(call["result_stats"]["per_step"][name]["suggested_atol"]) + rounding
        assert (error <= bound).all(), f"{name}: {error.tolist()} with tolerances {bound.tolist()}"
