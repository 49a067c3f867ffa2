"""What Stable Diffusion exports: the formats of `tools/export.py`."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from families.common.exports import OTHER_NAME, print_sizes, write_new_files
from families.common.library_files import constructor_numbers, save_library_folder
from families.common.lora_files import lora_files, notes_of_ranks
from families.common.lora_training import missing_tokens
from families.common.weight_files import FAMILY_KEY, GENERATOR, TARGET_KEY, is_run, metadata_of, weights_in
from families.stable_diffusion import build
from families.stable_diffusion.components import SKIP_KEY, TEXT_MODEL_KEY, TITLES, TOKENS_KEY, VERSION_KEY
from families.stable_diffusion.diffusers_folder import pipeline, save_t5_folder, t5_parts
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.lora import (
    UNET,
    encoders_by_name,
    merge,
    networks_by_name,
    open_loras,
    read_lora,
    version_of,
)
from families.stable_diffusion.single_file import CONFIG_KEY, ZERO_SNR_KEY, single_file_tensors
from families.stable_diffusion.t5_texts import PROJECTION_KEY, kind_of_projection
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.keys import Place
from warpcore.meta import only_shapes
from warpcore.outputs import check_new
from warpcore.safe_json import parse_json
from warpcore.weights import converted, dtype_name, write_weights

FAMILY = "stable_diffusion"
ARCHITECTURES = {"sd15": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
"""What the model spec that other programs show (modelspec.*) calls the published sizes."""
MODEL_SPEC_TARGETS = ("epsilon", "v")
"""What other programs know that a U-Net may predict, as the model spec calls it."""


class ExportSettings(SdInferenceSettings):
    """Keys of `diffusers` and `single-file`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights; float16 is what most shared files have."""
    only_unet: bool = False
    """Write the U-Net by itself, without autoencoder and text encoders."""
    lora: list[Place] = []
    """LoRAs that the weights are changed by, as FILE or FILE:STRENGTH: files, or runs that trained them."""


class Networks(NamedTuple):
    """What is written, by diffusers' names."""

    modules: dict[str, nn.Module]
    tokenizers: dict[str, Any]


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    settings = read_settings(source, arguments)
    networks = open_networks(settings)
    for name, network in networks.modules.items():
        network.load_state_dict(weights(name, network, settings), assign=True)
    if settings.only_unet or settings.text_model == "clip":  # a pipeline with T5 says it by its parts
        said = {f"_{key}": value for key, value in about_texts(settings).items()}
        networks.modules["unet"].register_to_config(**said)
    if settings.only_unet:
        save_library_folder(networks.modules["unet"], target)
    elif settings.text_model == "t5":
        save_t5_folder(networks.modules, networks.tokenizers["tokenizer"], settings, target)
    else:
        save_library_folder(pipeline(networks.modules, networks.tokenizers, settings), target)
    print_sizes(sorted(target.rglob("*.safetensors")))
    for note in skip_notes(settings, "diffusers"):
        print(f"{note}.")


def to_single_file(source: Path, target: Path, arguments: list[str]) -> None:
    settings = read_settings(source, arguments)
    check_new([target], OTHER_NAME)
    if settings.text_model == "t5" and not settings.only_unet:
        raise UserError("T5 is not part of checkpoints in one file: write `diffusers`, or add only_unet=true")
    networks = open_networks(settings).modules
    about = file_metadata(networks, settings)
    parts = {name: weights(name, networks.pop(name), settings) for name in [*networks]}  # each is held once
    layout, predicted = "sdxl" if settings.version.sees_sizes else "sd15", settings.diffusion_target or "epsilon"
    tensors = single_file_tensors(parts, layout, predicted, bool(settings.zero_terminal_snr))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, tensors, about | {"dtype": dtype_name(tensors)})
    print_sizes([target])
    for note in [*notes(settings), *skip_notes(settings, "other programs")]:
        print(f"{note}.")


def weights(name: str, network: nn.Module, settings: ExportSettings) -> dict[str, Tensor]:
    """The weights of a network in the precision that is asked for.

    Raises:
        UserError: one is too large for it.
    """
    try:
        return converted(network.state_dict(), getattr(torch, settings.export_dtype))
    except UserError as error:
        raise UserError(f"export_dtype: {TITLES[name]}: {error}") from None


def read_settings(source: Path, arguments: list[str]) -> ExportSettings:
    """The keys of an export of a run, of a checkpoint in one file, of a pipeline's folder, or of a U-Net's file."""
    key = "run" if is_run(source) else GENERATOR
    settings = load_config(ExportSettings, [f"--{key}", str(source), *arguments])
    if settings.generator_checkpoint_path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the U-Net to write; give them, or a run's folder")
    # As precise as they are: what they are read for computes nothing.
    return settings.model_copy(update={"autoencoder_precision": "float32", "text_encoder_precision": "float32"})


def open_networks(settings: ExportSettings) -> Networks:
    """The networks of the settings in float32, with their LoRAs."""
    loras = open_loras(settings.lora, settings, settings.use_ema)
    found = Networks({UNET: build.unet(settings)}, {})
    merge(loras, UNET, found.modules[UNET])
    if not settings.only_unet:
        found.modules["vae"] = build.autoencoder(settings).model
        texts = build.text_encoders(settings)
        if settings.text_model == "t5":
            found.modules.update(t5_parts(texts))
            found.tokenizers["tokenizer"] = texts.tokenizer
        for name, encoder in encoders_by_name(texts).items():
            merge(loras, name, encoder.model)
            found.modules[name] = encoder.model if name == "text_encoder_2" else without_projection(encoder.model)
            found.tokenizers[name.replace("text_encoder", "tokenizer")] = encoder.tokenizer
    for place, (lora, _) in zip(settings.lora, loras, strict=True):
        for note in notes_of_ranks(lora.values(), "merged"):
            print(f"{place}: {note}.")
        if any(own.tokens for own in lora.values()):
            print(f"The tokens of {place} are not in it: lora-kohya and lora-diffusers write them as embeddings.")
        if settings.only_unet and any(own.adapters for name, own in lora.items() if name != UNET):
            print(f"What {place} changes of the text encoders is not in it: only_unet leaves them out.")
    return found


def without_projection(encoder: nn.Module) -> nn.Module:
    """transformers' CLIPTextModel of a text encoder that may have a projection: what pipelines have as the first."""
    from transformers import CLIPTextModel

    if isinstance(encoder, CLIPTextModel):
        return encoder
    with torch.device("meta"):
        made = CLIPTextModel(copy.copy(encoder.config))
    whole, own = encoder.state_dict(), made.state_dict()
    made.load_state_dict({name: whole.get(name, whole.get(f"text_model.{name}")) for name in own}, assign=True)
    return made


def file_metadata(networks: Mapping[str, nn.Module], settings: ExportSettings) -> dict[str, str]:
    """What a single file says of itself: how each network is built, and what the U-Net predicts."""
    target = settings.diffusion_target or "epsilon"
    about = {
        "format": "pt",
        FAMILY_KEY: FAMILY,
        VERSION_KEY: settings.model_version,
        TARGET_KEY: target,
        ZERO_SNR_KEY: str(bool(settings.zero_terminal_snr)).lower(),
    }
    about |= about_texts(settings)
    about |= {CONFIG_KEY.format(name): json.dumps(config_of(network)) for name, network in networks.items()}
    if settings.model_version in ARCHITECTURES and target in MODEL_SPEC_TARGETS:
        about |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": ARCHITECTURES[settings.model_version],
            "modelspec.prediction_type": target,
        }
    return about


def about_texts(settings: ExportSettings) -> dict[str, str]:
    """What is said of the texts that a U-Net was trained with, where they are not read as published; in the config of
    a folder of diffusers, with `_` before each name, which diffusers passes over."""
    said = {} if settings.clip_skip is None else {SKIP_KEY: str(settings.clip_skip)}
    if settings.text_model == "t5":
        said |= {TEXT_MODEL_KEY: settings.text_model, TOKENS_KEY: str(settings.text_tokens)}
        said |= {PROJECTION_KEY: kind_of_projection(settings)}
    return said


def config_of(network: nn.Module) -> dict[str, Any]:
    """The config of a network of diffusers or transformers, as its `config.json` has it."""
    config = network.config
    if hasattr(config, "to_json_string"):
        return parse_json(config.to_json_string()) | {"architectures": [type(network).__name__]}
    return constructor_numbers(dict(config))


def notes(settings: ExportSettings) -> list[str]:
    """What to know about a single file in other programs."""
    target = settings.diffusion_target or "epsilon"
    if settings.model_version == "mini":
        return ["Only Warpcore reads it: no other program knows the mini"]
    if target == "v" and not settings.version.sees_sizes:
        return [
            "Files of Stable Diffusion 1.5 cannot say that they predict v: ComfyUI needs the node "
            "ModelSamplingDiscrete (v_prediction), A1111 a .yaml file with parameterization: v"
        ]
    if target not in MODEL_SPEC_TARGETS:
        return [f"No other program takes a network that predicts {target} for what it is"]
    return []


def skip_notes(settings: ExportSettings, program: str) -> list[str]:
    """What to write in other programs, which read CLIP as published unless they are told."""
    skip, published = settings.clip_skip, settings.version.hidden.skip_layers + 1
    if skip in (None, published) or settings.model_version == "mini":
        return []
    if program == "diffusers":
        remedy = f"write clip_skip={skip - published} in each call" if skip > published else "no call says that"
    else:
        remedy = f"A1111 needs Clip skip: {skip}, ComfyUI the node CLIP Set Last Layer with -{skip}"
    return [f"The U-Net reads CLIP's hidden state {skip} from the end, and {program} must be told: {remedy}"]


# ---------------------------------------------------------------- LoRA


KOHYA_SKIP_KEY = "ss_clip_skip"
"""The same as SKIP_KEY, as kohya's scripts write it into LoRAs."""


class LoraExportSettings(SdInferenceSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[Place] = []
    """The LoRA: this is SOURCE."""


def export_lora(kind: str, source: Path, target: Path, arguments: list[str]) -> None:
    key = "run" if is_run(source) else "lora"
    weights_in(source, "lora")  # says what is wrong with a run that has none
    said = version_of(source)
    model_version = ["--model_version", said] if said else []
    settings = load_config(LoraExportSettings, [f"--{key}", str(source), *model_version, *arguments])
    if len(settings.lora) != 1:
        raise UserError(f"one LoRA at a time, not {len(settings.lora)}: {', '.join(settings.lora) or source}")
    with only_shapes():
        networks = networks_by_name(build.unet(settings), build.text_encoders(settings))
    path = weights_in(source, "lora", settings.use_ema)
    loras = read_lora(path, networks, settings.model_version)
    about = {FAMILY_KEY: FAMILY, VERSION_KEY: settings.model_version}
    if skip := metadata_of(path).get(SKIP_KEY) or settings.clip_skip:
        about |= {SKIP_KEY: str(skip)} | ({KOHYA_SKIP_KEY: str(skip)} if kind == "kohya" else {})
    changed = {name: lora for name, lora in loras.items() if lora.adapters or lora.tokens}
    notes = [missing_tokens(lora) for lora in loras.values() if lora.missing_tokens]
    notes += notes_of_ranks(loras.values(), kind)
    write_new_files(lora_files(changed, target, kind, networks, about), notes)
