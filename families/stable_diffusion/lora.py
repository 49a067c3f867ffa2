"""LoRA and trained tokens on Stable Diffusion's U-Net and text encoders: networks by name, and their files."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from families.common.lora_files import DIFFUSERS_FILE, read_loras
from families.common.lora_formats import Lora, LoraFileError, peft
from families.common.text_encoders import ClipTextEncoder, ClipTextEncoders
from families.common.weight_files import read_header
from families.stable_diffusion.versions import TITLES

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""The networks of a pipeline, as LoRA files call them."""
_NAMES = {
    "sdxl": r"text_encoder_2\.|lora_te[12]_|lora_unet_(input|middle|output)_block|.*transformer_blocks[._][1-9]",
    "sd15": r"lora_te_|.*(down_blocks[._]0|up_blocks[._]3)[._]attentions",
}
"""Names of tensors that only LoRAs of one version have."""


def encoders_by_name(text: ClipTextEncoders) -> dict[str, ClipTextEncoder]:
    """The text encoders by the names that a pipeline has for them."""
    return dict(zip(TEXT_ENCODERS, text.encoders, strict=False))


def networks_by_name(unet: nn.Module, text: ClipTextEncoders) -> dict[str, nn.Module]:
    """The libraries' networks by the names that a pipeline has for them."""
    return {UNET: unet} | {name: encoder.model for name, encoder in encoders_by_name(text).items()}


def read_lora(path: Path, networks: Mapping[str, nn.Module], version: str) -> dict[str, Lora]:
    """What a LoRA or an embedding, in any format, changes of each of the networks (see `networks_by_name`).

    Args:
        version: the `model_version` of the networks.

    Raises:
        LoraFileError: it is for another version, damaged, or something else.
    """
    said = version_of(path)
    if said is not None and version in TITLES and said != version:
        raise LoraFileError(
            f"{path} is a LoRA of {TITLES[said]}, and the networks here are {TITLES[version]}: name a LoRA of "
            f"{TITLES[version]}, or write model_version: {said} and name weights of {TITLES[said]}"
        )
    return read_loras(path, networks, "model_version")


def version_of(path: Path) -> str | None:
    """The `model_version` that a LoRA file is for, where it can be told."""
    if path.is_dir():
        path = next((path / name for name in (peft.TENSORS, DIFFUSERS_FILE) if (path / name).is_file()), path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    header = read_header(path)
    said = header.metadata.get("model_version") or header.metadata.get("ss_base_model_version", "")
    if said in TITLES:
        return said
    of_kohya = {"sdxl": "sdxl", "sd_v1": "sd15"}
    told = next((version for start, version in of_kohya.items() if said.startswith(start)), None)
    by_names = (version for version, own in _NAMES.items() if any(re.match(own, name) for name in header.names))
    return told or next(by_names, None)
