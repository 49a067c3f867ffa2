"""LoRA files whose tensors are named after layers: of kohya's scripts, ComfyUI, OneTrainer, diffusers, peft, LyCORIS.

    lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight          kohya; ComfyUI reads it too
    lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight    ComfyUI, OneTrainer
    lora_prior_unet_down_blocks_0_2_attention_attn_in_proj_0.lora_down...   OneTrainer, flat
    unet.down_blocks.0.2.attention.attn.in_proj.0.lora_down.weight          OneTrainer, dotted
    base_model.model.down_blocks.0.2.attention.to_q.lora_A.weight           peft, on diffusers' network

Attention has three matrices there, in place of one. A tensor that is no part of a LoRA is an error, never left out.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from families.cascade.lora_formats import peft
from families.cascade.lora_formats.adapters import Adapter, Lora, LoraFileError, fused, pair, split, split_part
from modules.lora import PARTS, Place

PREFIXES = {"kohya": "lora_unet_", "comfyui": "lora_prior_unet_", "onetrainer": "lora_prior_unet_"}
"""What names begin with, by the program that reads them."""

# ---------------------------------------------------------------- writing


def flat_name(place: str) -> str:
    """`down_blocks.0.2.attention.attn.q` -> `down_blocks_0_2_attention_attn_to_q`."""
    layer, part = split_part(place)
    return (f"{layer}.to_{part}" if part else layer).replace(".", "_")


def to_named(lora: Lora, reader: str) -> dict[str, Tensor]:
    """The tensors of the adapters for one of the programs in `PREFIXES`.

    Raises LoraFileError for what it does not read.
    """
    tensors = {}
    for place, adapter in split(lora.adapters).items():
        if adapter.is_depthwise and reader != "comfyui":
            raise LoraFileError(
                f"{place} is a depthwise convolution, which {reader} adapts differently: use lora-merged"
            )
        if adapter.magnitude is not None and reader == "kohya":
            raise LoraFileError(f"{place} is adapted with DoRA, which kohya's scripts do not read: use lora-merged")
        name, kernel = PREFIXES[reader] + flat_name(place), [1] * (adapter.down.dim() - 2)
        tensors |= {
            f"{name}.lora_down.weight": adapter.down,
            f"{name}.lora_up.weight": adapter.up.view(*adapter.up.shape, *kernel),
            f"{name}.alpha": torch.tensor(float(adapter.plain_alpha)),
        }
        if adapter.magnitude is not None:
            lengths = adapter.magnitude if adapter.by_columns else adapter.magnitude[:, None]
            tensors[f"{name}.dora_scale"] = lengths.view(*lengths.shape, *kernel)
    return tensors


# ---------------------------------------------------------------- reading

_PREFIX = r"(?:base_model\.model\.)?(?:prior\.|unet\.|diffusion_model\.|lora_prior_unet[._]|lora_unet_|lycoris_)?"
_TENSORS = {
    "down": r"(?:lora_down|lora_A|lora\.down)(?:\.default)?\.weight",
    "up": r"(?:lora_up|lora_B|lora\.up)(?:\.default)?\.weight",
    "mid": r"lora_mid\.weight",
    "rows": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"dora_scale",
    "alpha": r"alpha",
}
_NOT_READ = {
    r"(?:lora_te\d?_|lora_prior_te[._]|clip_[gl]\.|text_encoder)": "part of a LoRA of the text encoder",
    r".+\.hada_\w+": "part of a LoHa",
    r".+\.lokr_\w+": "part of a LoKr",
    r".+\.oft_\w+(?:\.\w+)?": "part of an OFT adapter",
    r".+\.[ab][12]\.weight": "part of a GLoRA",
    r".+\.(?:diff|diff_b|w_norm|b_norm|set_weight)": "the whole change of a weight or a bias",
    r".+\.(?:lora_up|lora_down|lora_A|lora_B)(?:\.default)?\.bias": "a bias inside an adapter (lora_bias)",
    r".+\.(?:reshape_weight|on_input|scalar)": "an option of LyCORIS or ComfyUI",
}


def from_named(tensors: Mapping[str, Tensor], there: Mapping[str, Place], config: Mapping) -> Lora:
    """`config`: peft's `adapter_config.json`, or nothing.

    Raises LoraFileError for a tensor that is not read, and for a layer that the network does not have.
    """
    peft.check(config)
    names = {name.replace(".", "_"): place for place in there for name in _names(place)}
    found: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    others = []
    for name, tensor in tensors.items():
        layer, part = _parse(name)
        if part is None:
            others.append(name)
            continue
        if (place := names.get(layer.replace(".", "_"))) is None:
            raise LoraFileError(f"{name} is of a layer that this network does not have")
        found.setdefault(place, {})[part] = tensor
        if config and part == "down":
            alphas[place] = peft.alpha_of(config, layer, len(tensor))
    if others:
        raise LoraFileError(_refusal(others, there, of_lora=bool(found) or bool(config)))
    return Lora(fused({place: _adapter(place, own, alphas.get(place), config) for place, own in found.items()}))


def _parse(name: str) -> tuple[str, str | None]:
    """The layer and the part of an adapter (a key of `_TENSORS`) that a tensor is; no part where it is another."""
    if any(re.match(pattern, name) for pattern in _NOT_READ):
        return name, None
    for part, pattern in _TENSORS.items():
        if match := re.fullmatch(rf"{_PREFIX}(?P<layer>.+?)\.{pattern}", name):
            return match["layer"], part
    return name, None


def _names(place: str) -> list[str]:
    """What the other programs call a place."""
    layer, part = split_part(place)
    own = [place, peft.diffusers_name(place), flat_name(place)]
    return [*own, f"{layer}.in_proj.{PARTS.index(part)}"] if part else own


def _refusal(others: list[str], there: Mapping[str, Place], of_lora: bool) -> str:
    for pattern, what in _NOT_READ.items():
        if name := next((name for name in others if re.match(pattern, name)), None):
            return f"it holds {name}, {what}: only LoRA and DoRA of Stage C are read"
    if of_lora:
        return f"it holds {others[0]}, which belongs to no adapter (as `bias` and `modules_to_save` of peft do not)"
    if any(name.removesuffix(".weight") in there for name in others):
        return "it is no LoRA, but whole weights of Stage C, which generator_checkpoint_path takes"
    return f"it is no LoRA: its tensors are named like {others[0]!r}"


def _adapter(place: str, own: dict[str, Tensor], alpha: float | None, config: Mapping) -> Adapter:
    down, up = pair(place, own)
    if "mid" in own:  # a Tucker decomposition: `down` is 1 x 1, and what lies between has the kernels
        down = torch.einsum("mnhw,ni->mihw", own["mid"].float(), down.flatten(1).float()).to(down.dtype)
    if "alpha" in own:
        alpha = own["alpha"].item()
    magnitude = own["rows"].flatten() if "rows" in own else None
    if (lengths := own.get("dora_scale")) is not None:
        by_columns = lengths.dim() > 1 and lengths.shape[0] == 1 < up.shape[0]
        magnitude = lengths.flatten()[None] if by_columns else lengths.flatten()
    elif config.get("use_dora") and magnitude is None:
        raise LoraFileError(f"its config says use_dora, but {place} has no lora_magnitude_vector")
    return Adapter(down, up, up.shape[1] if alpha is None else alpha, magnitude, bool(config.get("use_rslora")))
