"""Part `golden` of `benchmarks/gpu.py`: the golden cases of the tests, on the device."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_part import Bench, Outcome, Part, Row
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.lora import LoraSettings, adapters, add_adapters
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC
from tests.golden import load_case, resolve, weights_of

CLASSES = {
    kind.__name__: kind for kind in (StageC, StageB, StageA, EfficientNetEncoder, Previewer, ControlNet)
}  # fmt: skip
CASES = (
    "stage_c_small", "stage_c_variants", "stage_b_small", "stage_a_small", "previewer_small", "controlnet_simple",
    "controlnet_large", "controlnet_effnet_1_channel", "effnet_encoder", "stage_a_full_size", "previewer_full_size",
)  # fmt: skip
TINY = CASES[:6]
FLOAT32_FACTOR = 4
"""The tolerances of the cases are those of one CPU's kernels; another device adds up in another order."""
BFLOAT16 = 0.04
"""Allowed root mean square error under autocast, relative to the root mean square of the result."""


def compute(network: nn.Module, call: dict, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What a recorded call gives."""
    args, kwargs = resolve(call.get("args", []), tensors), resolve(call.get("kwargs", {}), tensors)
    if isinstance(network, StageA):  # its published methods give more than ours
        decoded = call["method"] != "encode"
        latents = args[0] if call["method"] == "decode" else network.encode(args[0])
        return [network.decode(latents) if decoded else latents]
    result = getattr(network, call["method"])(*args, **kwargs)
    return list(result) if isinstance(result, list | tuple) else [result]


def expected_of(call: dict, tensors: dict[str, Tensor]) -> list[Tensor | None]:
    result = resolve(call["result"], tensors)
    return result if isinstance(result, list) else [result]


def case_row(case: str, dtype: torch.dtype, bench: Bench) -> Outcome:
    """All calls of a case; the one that is furthest off, in units of what is allowed, is shown."""
    spec, tensors = load_case(case)
    network = CLASSES[spec["component"]](**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors), strict=True)
    network.to(bench.device)
    tensors = {name: tensor.to(bench.device) for name, tensor in tensors.items()}
    worst, cells, count = -1.0, {}, 0
    for call in spec["calls"]:
        if (call.get("kwargs") or {}).get("quantize"):  # which codes are nearest may change with rounding
            continue
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            mine = compute(network, call, tensors)
        pairs = [(a, b) for a, b in zip(mine, expected_of(call, tensors), strict=False) if isinstance(b, Tensor)]
        for ours, theirs in pairs:
            count += 1
            error, allowed = error_of(ours, theirs, dtype, call["result_stats"].get("suggested_atol", 1e-4))
            if not error / allowed <= worst:
                worst = error / allowed
                cells = {"furthest call": call["name"], "error": f"{error:.1e}", "allowed": f"{allowed:.1e}"}
    if not count:
        raise ValueError(f"{case} holds no result to compare with")
    failure = "" if worst <= 1 else f"{cells['furthest call']} is off by {cells['error']}, allowed {cells['allowed']}"
    return Outcome([{"results": str(count), **cells}], failure)


def error_of(mine: Tensor, expected: Tensor, dtype: torch.dtype, atol: float) -> tuple[float, float]:
    """(error, allowed error): the largest difference in float32, the relative root mean square in bfloat16."""
    difference = mine.float() - expected.float()
    if dtype == torch.float32:
        return difference.abs().max().item(), FLOAT32_FACTOR * atol
    return (difference.square().mean() / expected.float().square().mean()).sqrt().item(), BFLOAT16


def lora_row(bench: Bench) -> Outcome:
    """Stage C with adapters on its attention layers, in float32."""
    spec, tensors = load_case("lora_stage_c")
    network = StageC(**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors), strict=True)
    rank = spec["rank"]
    add_adapters(network, spec["module_filters"], LoraSettings(rank=rank, alpha=rank * spec["scale"]))
    with torch.no_grad():
        for number, (_, _, adapter) in enumerate(adapters(network)):
            adapter.down.copy_(tensors[f"lora.weights.{number}.lora_down"])
            adapter.up.copy_(tensors[f"lora.weights.{number}.lora_up"])
    network.to(bench.device)
    with torch.no_grad():
        mine = network(**{name: tensors[key].to(bench.device) for name, key in spec["inputs"].items()})
    error = (mine.cpu() - tensors[spec["outputs"]["with_lora"]]).abs().max().item()
    allowed = spec["suggested_atol"]
    failure = "" if error <= allowed else f"off by {error:.1e}, allowed {allowed:.1e}"
    return Outcome([{"results": "1", "error": f"{error:.1e}", "allowed": f"{allowed:.1e}"}], failure)


def rows(bench: Bench) -> list[Row]:
    found: list[tuple[str, Callable]] = [
        (f"{case}, {str(dtype).removeprefix('torch.')}", partial(case_row, case, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for case in (TINY if bench.tiny else CASES)
    ]
    return [Row(name, measure) for name, measure in [*found, ("lora_stage_c, float32", lora_row)]]


PART = Part(
    name="golden",
    title="Golden: the reference implementation's numbers on this device",
    about=f"""
The golden cases of `tests/golden`. float32 (TF32 off): the largest difference may be {FLOAT32_FACTOR} times the case's
own tolerance. bfloat16 (autocast): the root mean square error may be {BFLOAT16:g} of the result's root mean square.
Calls that look up the nearest codes are left out.
""",
    columns=("results", "furthest call", "error", "allowed"),
    rows=rows,
)
