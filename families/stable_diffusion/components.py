"""The networks of a pipeline wherever a config may say that they are: what is known before weights are read, and they.

a pipeline of diffusers      runs/exported                      its folders unet, vae, text_encoder, text_encoder_2
the folder of one network    runs/exported/vae                  config.json and safetensors, in one file or several
a checkpoint in one file     v1-5-pruned-emaonly.safetensors    see `single_file`
one network in diffusers' or transformers' names                generator.safetensors of a run
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from families.common import library_files
from families.common.library_files import (
    CONFIG,
    PREDICTIONS,
    class_names,
    component_folder,
    read_config,
    read_tensors,
)
from families.common.weight_files import TARGET_KEY, Header, read_header
from families.common.weight_source import PIPELINE
from families.common.weights import WeightsError, existing_file
from families.stable_diffusion.single_file import (
    CONFIG_KEY,
    SUPPORTED,
    ZERO_SNR_KEY,
    Version,
    is_single_file,
    look_into,
    read_single_file,
)
from families.stable_diffusion.t5_layers import MAX_TOKENS
from warpcore.errors import UserError
from warpcore.exports import is_index
from warpcore.safe_json import parse_object, read_object
from warpcore.text import brief, shortened

TITLES = {
    "unet": "a U-Net", "vae": "an autoencoder", "text_encoder": "a text encoder",
    "text_encoder_2": "a second text encoder", "t5_encoder": "T5", "t5_projection": "the projection of T5's states",
    "t5_pooled_projection": "the projection of pooled texts",
}  # fmt: skip
"""What messages call the components."""
VERSION_KEY = "model_version"
"""Where our own files say which Stable Diffusion they are of."""
TEXT_MODEL_KEY, TOKENS_KEY, SKIP_KEY = "text_model", "text_tokens", "clip_skip"
"""Where they say what read the texts, and how."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The noise schedule of Stable Diffusion 1.5 and SDXL."""
FLOW_SCHEDULER, FLOW_PREDICTION = "FlowMatchEulerDiscreteScheduler", "flow_prediction"
"""Of schedulers for straight flows (`rectified_flows`): one that knows nothing else, others' `prediction_type`."""
T5_PART = "t5_projection"
"""A part that pipelines with T5 have, and no others."""
KNOWN_PARTS = {
    "unet", "vae", "scheduler", "text_encoder", "t5_encoder", "tokenizer", "t5_projection", "t5_pooled_projection",
    "safety_checker", "feature_extractor", "image_encoder",
}  # fmt: skip
"""Parts of pipelines with T5 that are read, or don't matter for drawing."""
PIPELINES = re.compile(r"StableDiffusion(XL)?(Img2Img)?Pipeline")
logger = logging.getLogger(__name__)
_CLASSES = {
    "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}  # fmt: skip
_TENSORS = {
    "unet": {"conv_in.weight", "time_embedding.linear_1.weight"},
    "vae": {"encoder.conv_in.weight", "encoder.mid_block.resnets.0.norm1.weight"},
    "text_encoder": {"embeddings.token_embedding.weight"},
    "text_encoder_2": {"text_model.embeddings.token_embedding.weight", "text_projection.weight"},
}  # fmt: skip
"""Tensors that tell what a file in the libraries' names holds."""


@dataclass(frozen=True)
class Component(library_files.Component):
    """A network in a file or folder, with what stands beside it."""

    version: str | None = None
    """Which Stable Diffusion it belongs to: of a U-Net, and of everything in one file with one."""
    diffusion_target: str | None = None
    """What the U-Net of the file or pipeline predicts, where it is said."""
    zero_terminal_snr: bool | None = None
    """Whether that U-Net was trained to pure noise, where it is said."""
    tokenizer: Path | None = None
    """The folder of a text encoder's tokenizer, where there is one."""
    text_model: str | None = None
    """What read the texts that the U-Net was trained with, where it is said: `clip` or `t5`."""
    text_tokens: int | None = None
    """Of T5's, how many tokens the U-Net was trained with, where it is said."""
    clip_skip: int | None = None
    """Which of CLIP's hidden states from the end it was trained with, where it is said."""


def holds(path: Path, name: str, key: str) -> bool:
    """Whether a whole pipeline or checkpoint has a component; a network by itself has no other.

    Raises:
        UserError: see `find_component`.
    """
    if path.is_dir():
        return (path / name / CONFIG).is_file()
    return _in_one_file(path, key) and name in look_into(path, key).components


def find_component(path: Path, name: str, key: str) -> Component:
    """The network `name` (`unet`, `vae`, `text_encoder`, `text_encoder_2`) of a file or folder; see this module.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, name, key)
    second = re.fullmatch(r"text_encoder(_ema)?\.safetensors", path.name)
    if name == "text_encoder_2" and second:
        path = path.with_name(f"text_encoder_2{second[1] or ''}.safetensors")
    if _in_one_file(path, key):
        return _of_single_file(path, name, key)
    return _of_library_file(path, name, key)


# ---------------------------------------------------------------- folders


def _of_folder(path: Path, name: str, key: str) -> Component:
    pipeline = _pipeline(path, key)
    folder = component_folder(path, name)
    config = read_config(folder, key)
    if config is None:
        what = f"a pipeline without {name}" if pipeline else "no folder of diffusers"
        raise UserError(
            f"{key}: {path} is {what}: it holds {_content(path)}. Name the folder of a pipeline ({PIPELINE}), or of "
            f"its {name} ({CONFIG} and safetensors)"
        )
    _check_class(folder, config, name, key)
    beside = folder.with_name(name.replace("text_encoder", "tokenizer"))
    tokenizer = beside if name.startswith("text_encoder") and beside.is_dir() else None
    target, zero_snr = _schedule(folder.with_name("scheduler"), key) if name == "unet" else (None, None)
    version = _version(config) if name == "unet" else None
    texts = _texts_said({name.removeprefix("_"): str(value) for name, value in config.items()})
    if pipeline is not None:
        of_t5 = T5_PART in pipeline
        texts |= {"text_model": "t5" if of_t5 else "clip", "text_tokens": _tokens_said(path, key) if of_t5 else None}
    return Component(folder, partial(read_tensors, folder, key), config, version, target, zero_snr, tokenizer, **texts)


def _pipeline(path: Path, key: str) -> Mapping[str, Any] | None:
    """The index of the pipeline that a folder holds; None where it holds none."""
    if not (path / PIPELINE).is_file():
        return None
    index = _json(path / PIPELINE, key)
    if T5_PART in index:  # of a class of its own, whose code is not run
        parts = {name for name, part in index.items() if isinstance(part, list) and part[-1:] not in ([], [None])}
        if unknown := sorted(parts - KNOWN_PARTS - {"_class_name"}):
            raise UserError(
                f"{key}: {path} has a part {shortened(unknown[0])}, which is not known here, so the U-Net might be "
                f"told more than texts. If it is not, name its networks one by one: {key}: {path / 'unet'}, and the "
                "folders beside it by autoencoder_checkpoint_path, text_encoder_checkpoint_path and "
                "text_projection_checkpoint_path"
            )
        return index
    pipeline = str(index.get("_class_name"))
    if not PIPELINES.fullmatch(pipeline):
        raise UserError(f"{key}: {path} holds a {shortened(pipeline)}; supported are {SUPPORTED}")
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{key}: {path} holds SDXL's refiner; supported are {SUPPORTED}")
    return index


def _tokens_said(path: Path, key: str) -> int | None:
    """How many tokens a pipeline with T5 pads texts to, where its tokenizer says it."""
    file = path / "tokenizer" / "tokenizer_config.json"
    said = _json(file, key).get("model_max_length") if file.is_file() else None
    return said if isinstance(said, int) and 0 < said <= MAX_TOKENS else None


def _check_class(folder: Path, config: Mapping[str, Any], name: str, key: str) -> None:
    """Raise UserError for a folder of another network, or of a U-Net that sees more than the noised latents."""
    classes = class_names(config)
    if classes and not classes & {*_CLASSES[name]}:
        raise UserError(
            f"{key}: {folder} holds {', '.join(sorted(classes))}, not {TITLES[name]} ({' or '.join(_CLASSES[name])})"
        )
    seen, predicted = config.get("in_channels", 4), config.get("out_channels", 4)
    if name == "unet" and seen != predicted:
        seen, predicted = brief(seen), brief(predicted)
        raise UserError(
            f"{key}: the U-Net in {folder} sees {seen} channels and predicts {predicted}, as inpainting and edit "
            f"models do; supported are {SUPPORTED}"
        )
    if name == "unet" and config.get("use_linear_projection") and _version(config) == "sd15":
        raise UserError(f"{key}: the U-Net in {folder} is that of Stable Diffusion 2.x; supported are {SUPPORTED}")


def _schedule(folder: Path, key: str) -> tuple[str | None, bool | None]:
    """What the U-Net of a pipeline predicts, and whether it was trained to pure noise, by its scheduler."""
    file = folder / "scheduler_config.json"
    if not file.is_file():
        return None, None
    config = _json(file, key)
    prediction = config.get("prediction_type", "epsilon")
    if config.get("_class_name") == FLOW_SCHEDULER or prediction == FLOW_PREDICTION:
        return "rectified_flows", False
    betas = {name: config.get(name, value) for name, value in BETAS.items()}
    if betas != BETAS:
        logger.warning(
            "%s: %s has the noise schedule %s; the one taken here is %s", key, file, shortened(str(betas)), BETAS
        )
    target = next((ours for ours, theirs in PREDICTIONS.items() if theirs == prediction), None)
    if target is None:
        said, known = shortened(str(prediction)), ", ".join(PREDICTIONS.values())
        raise UserError(f"{key}: {file}: prediction_type is {said}, not one of {known}")
    return target, bool(config.get("rescale_betas_zero_snr", False))


def _json(file: Path, key: str) -> Mapping[str, Any]:
    return read_object(file, f"{key}: {file}")


def _content(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"


# ---------------------------------------------------------------- files


def _in_one_file(path: Path, key: str) -> bool:
    """Whether a file has the names of single files; PyTorch's files, which would have to be opened for it, do."""
    return (path.suffix != ".safetensors" and not is_index(path)) or is_single_file(_header(path, key).names)


def _header(path: Path, key: str) -> Header:
    try:
        return read_header(existing_file(path, key))
    except WeightsError:
        raise
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _of_single_file(path: Path, name: str, key: str) -> Component:
    contents = look_into(path, key)
    if name not in contents.components:
        there = ", ".join(TITLES[one] for one in contents.components)
        raise UserError(f"{key}: {path} does not hold {TITLES[name]}, but {there}: name a file or folder that has one")
    config = contents.metadata.get(CONFIG_KEY.format(name))
    return Component(
        path,
        lambda: read_single_file(path, key, [name])[name],
        None if config is None else parse_object(config, f"{key}: {CONFIG_KEY.format(name)} of {path}"),
        contents.metadata.get(VERSION_KEY, contents.version),
        contents.diffusion_target,
        contents.zero_terminal_snr or None,
        **_texts_said(contents.metadata),
    )


def _of_library_file(path: Path, name: str, key: str) -> Component:
    header = _header(path, key)
    found = library_component(header.names)
    if found is None:
        look_into(path, key)  # raises an error that says what it is
    if found != name and (found, name) != ("text_encoder_2", "text_encoder"):
        raise UserError(f"{key}: {path} holds the weights of {TITLES.get(found)}, not of {TITLES[name]}")
    said = header.metadata.get(CONFIG_KEY.format(name))  # beside the U-Net's, in files of a run that trained both
    what = f"{key}: {CONFIG_KEY.format(name)} of {path}"
    config = read_config(path, key) if said is None else parse_object(said, what)
    zero_snr = header.metadata.get(ZERO_SNR_KEY)
    return Component(
        path,
        partial(read_tensors, path, key),
        config,
        header.metadata.get(VERSION_KEY, _version(config) if config is not None and name == "unet" else None),
        header.metadata.get(TARGET_KEY),
        None if zero_snr is None else zero_snr == "true",
        **_texts_said(header.metadata),
    )


def _texts_said(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own files say of the texts that the U-Net was trained with."""
    numbers = {
        key: int(text) if re.fullmatch(r"[1-9][0-9]{0,3}", text := metadata.get(key, "")) else None
        for key in (TOKENS_KEY, SKIP_KEY)
    }
    return {"text_model": metadata.get(TEXT_MODEL_KEY), **numbers}


def library_component(names: Collection[str]) -> str | None:
    """Which component a file in the names of diffusers and transformers holds, by the names of its tensors."""
    if any(".lora" in name for name in names):
        return None
    if "text_model.embeddings.token_embedding.weight" in names:
        return "text_encoder_2" if "text_projection.weight" in names else "text_encoder"
    return next((component for component, own in _TENSORS.items() if own <= {*names}), None)


def _version(config: Mapping[str, Any]) -> Version:
    """Which Stable Diffusion a U-Net is of."""
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
