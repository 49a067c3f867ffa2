"""What kohya's scripts and diffusers call the layers of the networks of a pipeline in LoRA files.

    unet             lora_unet_down_blocks_1_attentions_0_proj_in      SD 1.x, and networks of other families
                     lora_unet_input_blocks_4_1_proj_in                SDXL, whose original names kohya's scripts keep
    text_encoder     lora_te_text_model_encoder_layers_0_mlp_fc1       SD 1.x
                     lora_te1_text_model_encoder_layers_0_mlp_fc1      SDXL
    text_encoder_2   lora_te2_text_model_encoder_layers_0_mlp_fc1      SDXL

diffusers' names are those of the network behind `unet.`, `text_encoder.`, `text_encoder_2.` or `transformer.`. A
network may have a third name for each layer, that of the program that it was published with (`published_layer`):
ComfyUI reads these behind `diffusion_model.`, Cosmos-Predict2 behind `net.`.
"""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from families.common.original_unet import original_unet_name

TEXT_MODEL = "text_model."
"""What published names of CLIP's layers begin with; transformers 5 dropped it of CLIPTextModel."""


def kohya_prefix(network: str, others: Collection[str]) -> str:
    """What kohya's names of a network begin with; `others` are the networks of its pipeline."""
    if network in ("unet", "transformer"):
        return "lora_unet_"
    if network == "text_encoder_2":
        return "lora_te2_"
    return "lora_te1_" if "text_encoder_2" in others else "lora_te_"


def prefixes(network: str) -> tuple[str, ...]:
    """What a file's names may begin with for a network."""
    kohya = {"text_encoder": ("lora_te1_", "lora_te_"), "text_encoder_2": ("lora_te2_",)}
    others = ("lora_unet_", "diffusion_model.", "lycoris_", "net.")
    return (f"{network}.", f"lora_{network}.", *kohya.get(network, others))


def kohya_names(network: str, module: nn.Module, places: Iterable[str]) -> dict[str, str]:
    """Place -> its name behind kohya's prefix."""
    original = network == "unet" and _is_sdxl(module)
    names = _original_names(module, places) if original else diffusers_names(network, places)
    return {place: name.replace(".", "_") for place, name in names.items()}


def diffusers_names(network: str, places: Iterable[str]) -> dict[str, str]:
    """Place -> its name behind the network's."""
    if not network.startswith("text_encoder"):
        return {place: place for place in places}
    whole = (TEXT_MODEL, "text_projection")
    return {place: place if place.startswith(whole) else TEXT_MODEL + place for place in places}


def published_names(module: nn.Module, places: Iterable[str]) -> dict[str, str]:
    """Place -> what the program that a network was published with calls it, where that is known."""
    named = getattr(module, "published_layer", lambda place: None)
    return {place: name for place in places if (name := named(place)) is not None}


def names_read(network: str, module: nn.Module, places: Collection[str]) -> dict[str, str]:
    """What any program may call a layer, with `_` for dots -> its place."""
    same = {place: place for place in places}
    tables: list[Mapping[str, str]] = [same, diffusers_names(network, places), published_names(module, places)]
    if network == "unet" and _has_levels(places):
        tables.append(_original_names(module, places))
    return {name.replace(".", "_"): place for table in tables for place, name in table.items()}


def _is_sdxl(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "addition_embed_type", None) == "text_time"


def _has_levels(places: Collection[str]) -> bool:
    return any(place.startswith("down_blocks.") for place in places)


def _original_names(module: nn.Module, places: Iterable[str]) -> dict[str, str]:
    attention = {i for i, block in enumerate(module.up_blocks) if getattr(block, "attentions", None) is not None}
    return {place: original_unet_name(place, module.config.layers_per_block, attention) for place in places}
