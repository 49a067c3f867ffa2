"""Golden cases: inputs, weights and expected outputs computed by the Stable Cascade reference implementation.

`NAME.json` describes a case and `NAME.safetensors`, where there is one, holds its tensors. Files that gzip makes much
smaller are packed.

To fit in 6 MB, the weights of `stage_c_small`, `stage_c_variants`, `stage_b_small` and `lora_stage_c` are rounded to
float16. The outputs for these weights were computed by this project's code, right after the same code had given the
reference implementation's outputs, within the tolerances of the cases, for the weights before rounding. What the
reference gave is in `reference_outputs.safetensors`: rounding moves it by less than `ROUNDING`. Sampling loops
keep their first and last step; filters keep one picture of each size.

`lycoris` was computed by the modules of lycoris-lora 4.1.3, on random weights and factors.

The weights of the cases in `sd_t5`, `cosmos`, `opensora` and `nova` are those of the reference, to the bit of a
rounding, made by the recipes that they turned out to follow.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load, load_file

FOLDER = Path(__file__).parent
ROUNDING = 2e-3
"""Root mean square error that rounding the weights may cause, relative to the root mean square of the outputs."""


def load_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description of a case and its tensors by name; floats are float32, those that are stored in 16 bits too."""
    content = _content(f"{name}.safetensors")
    tensors = {} if content is None else load(content)
    return _read_json(name), {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}


def reference_outputs() -> dict[str, torch.Tensor]:
    """What the reference implementation gave for the weights before rounding, by CASE/CALL."""
    return load_file(FOLDER / "reference_outputs.safetensors")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square error, relative to the root mean square of what is expected."""
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def load_manifest(name: str, family: str = "") -> dict:
    """Names and shapes of a published full-size checkpoint; the families' own ones are in folders (`sd_t5`)."""
    return _read_json(f"{family or '.'}/manifests/{name}")


def _read_json(name: str) -> dict:
    content = _content(f"{name}.json")
    if content is None:
        raise FileNotFoundError(FOLDER / f"{name}.json")
    return json.loads(content)


def _content(name: str) -> bytes | None:
    """Of a file, packed or not; None where there is none."""
    path, packed = FOLDER / name, FOLDER / f"{name}.gz"
    if packed.exists():
        return gzip.decompress(packed.read_bytes())
    return path.read_bytes() if path.exists() else None


def resolve(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace `{"tensor": key}` by that tensor, also inside lists and mappings of arguments."""
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = tensors[value["tensor"]]
            return tensor / 255 if value.get("transform") == "uint8_to_unit_float" else tensor
        return {key: resolve(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, tensors) for item in value]
    return value


def weights_of(
    spec: dict, tensors: dict[str, torch.Tensor], computed: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """The state dict of a case, stored or made by its seeded recipe (checked against the case's sum).

    computed: tensors that no recipe draws, such as tables of positions.
    """
    weights = spec["weights"]
    if weights["kind"] == "stored":
        prefix = weights["prefix"]
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    made = _by_recipe(weights, computed)
    total = sum(tensor.abs().double().sum().item() for tensor in made.values() if tensor.is_floating_point())
    expected = weights["check"]["sum_of_abs_over_all_float_tensors"]
    assert abs(total - expected) <= 1e-6 * expected, "the recipe was not followed"
    return made


def _by_recipe(weights: dict, computed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(weights["seed"])
    made = {}
    for name in sorted(weights["tensors"]):
        shape = weights["tensors"][name]
        last = name.split(".")[-1]
        if name in computed:
            made[name] = computed[name]
        elif last == "num_batches_tracked":
            made[name] = torch.zeros((), dtype=torch.int64)
        elif last == "running_var":
            made[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            draw = torch.randn(shape, generator=generator)
            if name in (deviations := weights.get("deviations", {})):
                made[name] = deviations[name] * draw
            elif last == "running_mean":
                made[name] = 0.1 * draw
            elif last == "gammas":
                made[name] = 0.4 + 0.15 * draw
            elif last in ("gamma", "beta"):
                made[name] = weights.get("gamma_deviation", 0.3) * draw
            elif last.startswith("scale_shift_table"):
                made[name] = 0.3 * draw
            elif name.endswith(("y_embedding", "embedding_table.weight")):
                made[name] = 0.5 * draw
            elif draw.dim() >= 2:
                gain = weights.get("gains", {}).get(name, weights["gain"])
                made[name] = draw * (gain / (draw.numel() / draw.shape[0]) ** 0.5)
            elif last == "weight":
                made[name] = 1 + weights.get("norm_deviation", 0.1) * draw
            else:
                made[name] = weights.get("bias_deviation", 0.1) * draw
    return made
