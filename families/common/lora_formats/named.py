"""LoRA files whose tensors are named after layers: of kohya's scripts, ComfyUI, OneTrainer, diffusers, peft, LyCORIS.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight      kohya and ComfyUI: flat, `alpha` beside it
    lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w1               LyCORIS and ComfyUI: factors of LoKr, of LoHa
    lora_unet.down_blocks.0.attentions.0.proj_in.lora_down.weight      OneTrainer
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight              diffusers
    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight  peft

A tensor that is no part of a LoRA is an error, never left out.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from families.common.lora_formats import peft
from families.common.lora_formats.adapters import (
    LoraFileError,
    OneAdapter,
    adapter_of,
    is_alpha,
    lora_alone,
    pair,
)
from modules.lora import KINDS
from warpcore.text import brief

# ---------------------------------------------------------------- writing


def to_named(adapters: Mapping[str, OneAdapter]) -> dict[str, Tensor]:
    """The tensors of adapters by the names of their layers, in the spelling of kohya's scripts and of LyCORIS.

    Raises LoraFileError for LoKr and LoHa with DoRA, which are read alone.
    """
    tensors = {}
    for name, adapter in adapters.items():
        kernel = [1] * (adapter.down.dim() - 2) if adapter.kind == "lora" else []
        if adapter.kind == "lora":
            up = adapter.up.view(*adapter.up.shape, *kernel)
            own = {"lora_down.weight": adapter.down, "lora_up.weight": up}
        else:
            own = _factors(name, adapter)
        tensors |= {f"{name}.{part}": tensor for part, tensor in (own | _beside(adapter, kernel)).items()}
    return tensors


def to_comfyui(adapters: Mapping[str, OneAdapter]) -> dict[str, Tensor]:
    """The tensors of adapters by the published names of their layers, as ComfyUI and diffusion-pipe have them.

    Raises LoraFileError for LoKr and LoHa with DoRA, which are read alone.
    """
    tensors = {}
    for name, adapter in adapters.items():
        if adapter.kind == "lora":
            own = {"lora_A.weight": adapter.down, "lora_B.weight": adapter.up}
        else:
            own = _factors(name, adapter)
        tensors |= {f"diffusion_model.{name}.{part}": tensor for part, tensor in (own | _beside(adapter, [])).items()}
    return tensors


def _factors(name: str, adapter: OneAdapter) -> dict[str, Tensor]:
    if adapter.magnitude is not None:
        raise LoraFileError(f"{name} is a {adapter.title} with DoRA, which is read, but not written: merge it")
    return {**adapter.tensors}


def _beside(adapter: OneAdapter, kernel: list[int]) -> dict[str, Tensor]:
    """What stands beside the factors; kernel: a 1 for each dimension of a convolution's."""
    own = {"alpha": torch.tensor(float(adapter.plain_alpha))}
    if adapter.magnitude is not None:
        lengths = adapter.magnitude if adapter.by_columns else adapter.magnitude[:, None]
        own["dora_scale"] = lengths.view(*lengths.shape, *kernel)
    return own


def to_published(adapters: Mapping[str, OneAdapter]) -> dict[str, Tensor]:
    """The tensors of adapters as peft names them inside a network called `net`; alpha is the rank, as nothing says it.

    Raises LoraFileError for DoRA, LoKr and LoHa, which such files cannot say.
    """
    lora_alone(adapters, "the published program")
    tensors = {}
    for name, adapter in adapters.items():
        if adapter.magnitude is not None:
            raise LoraFileError(f"{name} is adapted with DoRA, which has no published names: use lora-comfyui")
        tensors |= {
            f"net.{name}.lora_A.default.weight": adapter.down,
            f"net.{name}.lora_B.default.weight": adapter.up * (adapter.plain_alpha / adapter.rank),
        }
    return tensors


def kohya_metadata(adapters: Collection[OneAdapter], about: Mapping[str, str]) -> dict[str, str]:
    """What kohya's scripts say of a file in its metadata: which of their modules made it, and its numbers.

    about: our own metadata.
    """
    found = {"ss_network_module": "networks.lora", "ss_network_dim": about["rank"], "ss_network_alpha": about["alpha"]}
    kinds = {adapter.kind for adapter in adapters} - {"lora"}
    if kinds:
        algo = json.dumps({"algo": min(kinds)})
        found |= {"ss_network_module": "lycoris.kohya", "ss_network_args": algo}
    return found


# ---------------------------------------------------------------- reading

TUCKER = {"lokr": {"lokr_t2": ("lokr_w2_a", "lokr_w2_b")},
          "loha": {f"hada_t{i}": (f"hada_w{i}_a", f"hada_w{i}_b") for i in "12"}}  # fmt: skip
"""The cores of Tucker decompositions of kernels, and the factors that they stand between."""
_TENSORS = {
    "down": r"(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight",
    "up": r"(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.default)?\.weight",
    "mid": r"lora_mid\.weight",
    "rows": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"dora_scale",
    "alpha": r"alpha",
} | {name: name for kind in ("lokr", "loha") for name in (*KINDS[kind].factors, *TUCKER[kind])}
_OTHER_KINDS = {
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
) -> dict[str, OneAdapter]:
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
            return f"it holds {name}, {what}: only LoRA, DoRA, LoKr and LoHa of {network} are read"
    if of_lora:
        return f"it holds {others[0]}, which belongs to no adapter (as `bias` and `modules_to_save` of peft do not)"
    if any(name.removesuffix(".weight") in weights for name in others):
        return f"it is no LoRA, but whole weights of {network}, which generator_checkpoint_path takes"
    return f"it is no LoRA: its tensors are named like {others[0]!r}"


def _adapter(place: str, own: dict[str, Tensor], alpha: float | None, config: Mapping) -> OneAdapter:
    own = _without_tucker(place, own)
    if (said := own.pop("alpha", None)) is not None:
        if said.numel() != 1 or not is_alpha(said.item()):
            raise LoraFileError(f"the alpha of {place} is {brief(said.tolist())}, which is no number that can be one")
        alpha = said.item()
    rows, lengths = own.pop("rows", None), own.pop("dora_scale", None)
    if lengths is None and rows is None and config.get("use_dora"):
        raise LoraFileError(f"its config says use_dora, but {place} has no lora_magnitude_vector")
    adapter = adapter_of(place, own, alpha, None if rows is None else rows.flatten(), bool(config.get("use_rslora")))
    if lengths is None:
        return adapter
    by_columns = lengths.dim() > 1 and lengths.shape[0] == 1 < adapter.size[0]
    return replace(adapter, magnitude=lengths.flatten()[None] if by_columns else lengths.flatten())


def _without_tucker(place: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter without Tucker decompositions of its kernels: their cores become part of the factors."""
    own = {**own}
    if "mid" in own:  # `down` is 1 x 1, and what lies between has the kernels
        down, up = pair(place, own)
        kernels = torch.einsum("mnhw,ni->mihw", own.pop("mid").float(), down.flatten(1).float())
        own |= {"down": kernels.to(down.dtype), "up": up}
    for core, (a, b) in [(core, parts) for kind in TUCKER.values() for core, parts in kind.items() if core in own]:
        between = own.pop(core).float()  # (R, R, kh, kw), with `a` (R, rows) and `b` (R, columns)
        if not {a, b} <= own.keys() or between.dim() < 3 or between.shape[:2] != (len(own[a]), len(own[b])):
            raise LoraFileError(f"{core} of {place} does not go with {a} and {b}: the file is not whole")
        own[b] = torch.einsum("ij...,jc->ic...", between, own[b].float()).flatten(1)
        own[a] = own[a].T.contiguous()
    return own
