"""What other programs call the layers of Stage C in LoRA files.

    lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight          kohya; ComfyUI reads it too
    lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight    ComfyUI, OneTrainer
    lora_prior_unet_down_blocks_0_2_attention_attn_in_proj_0.lora_down...   OneTrainer, flat
    unet.down_blocks.0.2.attention.attn.in_proj.0.lora_down.weight          OneTrainer, dotted
    base_model.model.down_blocks.0.2.attention.to_q.lora_A.weight           peft, on diffusers' network

Attention has three matrices there, in place of one.
"""

from collections.abc import Mapping

from torch import Tensor

from families.common.lora_formats import named, peft
from families.common.lora_formats.adapters import Lora, LoraFileError, fused, lora_alone, split, split_part
from modules.lora import PARTS, Place

PREFIXES = {"kohya": "lora_unet_", "comfyui": "lora_prior_unet_", "onetrainer": "lora_prior_unet_"}
"""What names begin with, by the program that reads them."""
_ANY_PREFIX = r"(?:base_model\.model\.)?(?:prior\.|unet\.|diffusion_model\.|lora_prior_unet[._]|lora_unet_|lycoris_)?"
_NOT_READ = {r"(?:lora_te\d?_|lora_prior_te[._]|clip_[gl]\.|text_encoder)": "part of a LoRA of the text encoder"}


def flat_name(place: str) -> str:
    """`down_blocks.0.2.attention.attn.q` -> `down_blocks_0_2_attention_attn_to_q`."""
    layer, part = split_part(place)
    return (f"{layer}.to_{part}" if part else layer).replace(".", "_")


def diffusers_name(place: str) -> str:
    """`down_blocks.0.2.attention.attn.q` -> `down_blocks.0.2.attention.to_q`."""
    layer, part = split_part(place)
    return f"{layer.removesuffix('.attn')}.to_{part}" if part else layer.replace(".attn.out_proj", ".to_out.0")


def to_named(lora: Lora, reader: str) -> dict[str, Tensor]:
    """The tensors of the adapters for one of the programs in `PREFIXES`.

    Raises LoraFileError for what it does not read.
    """
    adapters = split(lora.adapters)
    if reader == "onetrainer":
        lora_alone(adapters, "OneTrainer's form")
    for place, adapter in adapters.items():
        if adapter.is_depthwise and reader != "comfyui":
            raise LoraFileError(
                f"{place} is a depthwise convolution, which {reader} adapts differently: use lora-merged"
            )
        if adapter.magnitude is not None and reader == "kohya":
            raise LoraFileError(f"{place} is adapted with DoRA, which kohya's scripts do not read: use lora-merged")
    return named.to_named({PREFIXES[reader] + flat_name(place): adapter for place, adapter in adapters.items()})


def to_peft(lora: Lora) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the `adapter_config.json` for peft on diffusers' `StableCascadeUNet`.

    Raises LoraFileError for what peft adapts differently.
    """
    adapters = {diffusers_name(place): adapter for place, adapter in split(lora.adapters).items()}
    return peft.to_peft(adapters, "base_model.model.")


def from_named(tensors: Mapping[str, Tensor], there: Mapping[str, Place], config: Mapping) -> Lora:
    """`config`: peft's `adapter_config.json`, or nothing.

    Raises LoraFileError for a tensor that is not read, and for a layer that the network does not have.
    """
    names = {name.replace(".", "_"): place for place in there for name in _names(place)}
    adapters = named.from_named(
        tensors, names, config, prefix=_ANY_PREFIX, not_read=_NOT_READ, weights=there.keys(), network="Stage C"
    )
    return Lora(fused(adapters, there))


def _names(place: str) -> list[str]:
    """What the other programs call a place."""
    layer, part = split_part(place)
    own = [place, diffusers_name(place), flat_name(place)]
    return [*own, f"{layer}.in_proj.{PARTS.index(part)}"] if part else own
