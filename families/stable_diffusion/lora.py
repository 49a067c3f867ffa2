"""LoRA and trained tokens on Stable Diffusion's U-Net and text encoders: networks by name, and their files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from families.common.lora import listed_loras, merge_loras
from families.common.lora_files import DIFFUSERS_FILE, read_loras
from families.common.lora_formats import Lora, LoraFileError, peft
from families.common.lora_training import warn_of_missing_tokens
from families.common.text_encoders import ClipTextEncoder, ClipTextEncoders
from families.common.weight_files import read_header
from families.stable_diffusion import build
from families.stable_diffusion.single_file import SUPPORTED
from families.stable_diffusion.versions import TITLES
from warpcore.meta import only_shapes

Loras = Sequence[tuple[Mapping[str, Lora], float]]
"""What each LoRA changes of each network (`unet`, `text_encoder`, `text_encoder_2`), and its strength."""
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


def unread_notes(text: ClipTextEncoders, pooled: bool) -> list[str]:
    """A line for each text encoder with trained weights that never learn, as nothing reads what they make.

    pooled: whether the U-Net is told the pooled vector of the last encoder.
    """
    notes = []
    for name, encoder in encoders_by_name(text).items():
        parts = encoder.unread(pooled and encoder is text.encoders[-1])
        count = sum(parameter.requires_grad for part in parts for parameter in part.parameters())
        if count:
            notes.append(
                f"{name}: {count} trained tensors never learn and stay as they are: they lie behind the hidden state "
                f"that the U-Net reads, number {encoder.hidden.skip_layers + 1} from the end (clip_skip)"
            )
    return notes


def open_loras(files: Sequence[str], settings, use_ema: bool = True) -> Loras:
    """Read LoRAs, written as FILE[:STRENGTH], for the networks that the settings name.

    A FILE may be the folder of a training run; use_ema takes its averaged weights, where there are some.

    Raises:
        LoraFileError: a file is missing or made for another network.
    """
    if not files:
        return []
    with only_shapes():
        networks = networks_by_name(build.unet(settings), build.text_encoders(settings))
    opened = [
        (read_lora(path, networks, settings.model_version), strength)
        for path, strength in listed_loras(files, use_ema)
    ]
    warn_of_missing_tokens(files, [lora.values() for lora, _ in opened])
    return opened


def of_network(loras: Loras, name: str) -> list[tuple[Lora, float]]:
    """What LoRAs change of one network, each with its strength."""
    return [(lora[name], strength) for lora, strength in loras if name in lora]


def merge(loras: Loras, name: str, network: nn.Module) -> None:
    """Add the changes of LoRAs to the weights of the network of this name."""
    merge_loras(network, of_network(loras, name))


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
    """The `model_version` that a LoRA file is for, where it can be told.

    Raises:
        LoraFileError: it says that it is for Stable Diffusion 2.x.
    """
    if path.is_dir():
        path = next((path / name for name in (peft.TENSORS, DIFFUSERS_FILE) if (path / name).is_file()), path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    header = read_header(path)
    said = header.metadata.get("model_version") or header.metadata.get("ss_base_model_version", "")
    if said in TITLES:
        return said
    if said.startswith("sd_v2"):
        raise LoraFileError(f"{path} is a LoRA of Stable Diffusion 2.x; supported are {SUPPORTED}")
    of_kohya = {"sdxl": "sdxl", "sd_v1": "sd15"}
    told = next((version for start, version in of_kohya.items() if said.startswith(start)), None)
    by_names = (version for version, own in _NAMES.items() if any(re.match(own, name) for name in header.names))
    return told or next(by_names, None)
