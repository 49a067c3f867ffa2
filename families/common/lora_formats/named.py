"""LoRA files whose tensors are named after layers: of kohya's scripts, ComfyUI, OneTrainer, diffusers, peft, LyCORIS.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight      kohya and ComfyUI: flat, `alpha` beside it
    lora_unet.down_blocks.0.attentions.0.proj_in.lora_down.weight      OneTrainer
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight              diffusers
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight  peft

A tensor that is no part of a LoRA is an error, never left out.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from families.common.lora_formats import peft
from families.common.lora_formats.adapters import Adapter, LoraFileError, pair

# ---------------------------------------------------------------- writing


def to_named(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of adapters by the names of their layers, in the spelling of kohya's scripts."""
    tensors = {}
    for name, adapter in adapters.items():
        kernel = [1] * (adapter.down.dim() - 2)
        tensors |= {
            f"{name}.lora_down.weight": adapter.down,
            f"{name}.lora_up.weight": adapter.up.view(*adapter.up.shape, *kernel),
            f"{name}.alpha": torch.tensor(float(adapter.plain_alpha)),
        }
        if adapter.magnitude is not None:
            lengths = adapter.magnitude if adapter.by_columns else adapter.magnitude[:, None]
            tensors[f"{name}.dora_scale"] = lengths.view(*lengths.shape, *kernel)
    return tensors


def to_comfyui(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of adapters by the published names of their layers, as ComfyUI and diffusion-pipe have them."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors |= {
            f"diffusion_model.{name}.lora_A.weight": adapter.down,
            f"diffusion_model.{name}.lora_B.weight": adapter.up,
            f"diffusion_model.{name}.alpha": torch.tensor(float(adapter.plain_alpha)),
        }
        if adapter.magnitude is not None:
            lengths = adapter.magnitude if adapter.by_columns else adapter.magnitude[:, None]
            tensors[f"diffusion_model.{name}.dora_scale"] = lengths
    return tensors


def to_published(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of adapters as peft names them inside a network called `net`; alpha is the rank, as nothing says it.

    Raises LoraFileError for DoRA, which such files cannot say.
    """
    tensors = {}
    for name, adapter in adapters.items():
        if adapter.magnitude is not None:
            raise LoraFileError(f"{name} is adapted with DoRA, which has no published names: use lora-comfyui")
        tensors |= {
            f"net.{name}.lora_A.default.weight": adapter.down,
            f"net.{name}.lora_B.default.weight": adapter.up * (adapter.plain_alpha / adapter.rank),
        }
    return tensors


# ---------------------------------------------------------------- reading

_TENSORS = {
    "down": r"(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight",
    "up": r"(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.default)?\.weight",
    "mid": r"lora_mid\.weight",
    "rows": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"dora_scale",
    "alpha": r"alpha",
}
_OTHER_KINDS = {
    r".+\.hada_\w+": "part of a LoHa",
    r".+\.lokr_\w+": "part of a LoKr",
    r".+\.oft_\w+(?:\.\w+)?": "part of an OFT adapter",
    r".+\.[ab][12]\.weight": "part of a GLoRA",
    r".+\.(?:diff|diff_b|w_norm|b_norm|set_weight)": "the whole change of a weight or a bias",
    r".+\.(?:lora_up|lora_down|lora_A|lora_B)(?:\.default)?\.bias": "a bias inside an adapter (lora_bias)",
    r".+\.(?:reshape_weight|on_input|scalar)": "an option of LyCORIS or ComfyUI",
}


def from_named(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    config: Mapping,
    *,
    prefix: str,
    not_read: Mapping[str, str],
    weights: Collection[str],
    network: str = "this network",
) -> dict[str, Adapter]:
    """The adapters of a file by the names of their places.

    Args:
        names: what a layer may be called, with `_` for dots -> its place.
        config: peft's, or nothing.
        prefix: a regular expression of what may stand before a layer's name.
        not_read: regular expressions of tensors that belong elsewhere -> what they are.
        weights: names of the network's layers, to recognise a file of whole weights.
        network: what an error calls the network.

    Raises:
        LoraFileError: a tensor is not read, or of a layer that the network does not have.
    """
    peft.check(config)
    not_read = not_read | _OTHER_KINDS
    found: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others = []
    for name, tensor in tensors.items():
        layer, part = _parse(name, prefix, not_read)
        if part is None:
            others.append(name)
            continue
        if (place := names.get(layer.replace(".", "_"))) is None:
            raise LoraFileError(f"{name} is of a layer that this network does not have")
        found.setdefault(place, {})[part] = tensor
        if config and part == "down":
            alphas[place] = peft.alpha_of(config, layer, len(tensor))
    if others:
        raise LoraFileError(_refusal(others, not_read, weights, network, of_lora=bool(found) or bool(config)))
    return {place: _adapter(place, own, alphas.get(place), config) for place, own in found.items()}


def _parse(name: str, prefix: str, not_read: Mapping[str, str]) -> tuple[str, str | None]:
    """The layer and the part of an adapter (a key of `_TENSORS`) that a tensor is; no part where it is another."""
    if any(re.match(pattern, name) for pattern in not_read):
        return name, None
    for part, pattern in _TENSORS.items():
        if match := re.fullmatch(rf"{prefix}(?P<layer>.+?)\.{pattern}", name):
            return match["layer"], part
    return name, None


def _refusal(
    others: list[str], not_read: Mapping[str, str], weights: Collection[str], network: str, of_lora: bool
) -> str:
    for pattern, what in not_read.items():
        if name := next((name for name in others if re.match(pattern, name)), None):
            return f"it holds {name}, {what}: only LoRA and DoRA of {network} are read"
    if of_lora:
        return f"it holds {others[0]}, which belongs to no adapter (as `bias` and `modules_to_save` of peft do not)"
    if any(name.removesuffix(".weight") in weights for name in others):
        return f"it is no LoRA, but whole weights of {network}, which generator_checkpoint_path takes"
    return f"it is no LoRA: its tensors are named like {others[0]!r}"


def _adapter(place: str, own: dict[str, Tensor], alpha: float | None, config: Mapping) -> Adapter:
    down, up = pair(place, own)
    if "mid" in own:  # a Tucker decomposition: `down` is 1 x 1, and what lies between has the kernels
        down = torch.einsum("mnhw,ni->mihw", own["mid"].float(), down.flatten(1).float()).to(down.dtype)
    if "alpha" in own:
        if own["alpha"].numel() != 1:
            raise LoraFileError(f"the alpha of {place} is {own['alpha'].numel()} numbers, not one")
        alpha = own["alpha"].item()
    magnitude = own["rows"].flatten() if "rows" in own else None
    if (lengths := own.get("dora_scale")) is not None:
        by_columns = lengths.dim() > 1 and lengths.shape[0] == 1 < up.shape[0]
        magnitude = lengths.flatten()[None] if by_columns else lengths.flatten()
    elif config.get("use_dora") and magnitude is None:
        raise LoraFileError(f"its config says use_dora, but {place} has no lora_magnitude_vector")
    return Adapter(down, up, up.shape[1] if alpha is None else alpha, magnitude, bool(config.get("use_rslora")))
