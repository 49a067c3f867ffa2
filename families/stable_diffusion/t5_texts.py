"""T5 and its projections, wherever a config may say that they are.

`opendiffusionai/stablediffusion_t5` and pipelines like it have T5 as `text_encoder`, those of SDXL as `t5_encoder`, or
leave it out; both have `t5_projection`, and SDXL's `t5_pooled_projection`. None of their Python code is run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from families.common.library_files import CONFIG, component_folder, fill, read_config, read_tensors
from families.common.t5 import T5_XXL, StandInTokenizer, T5TextEncoder
from families.common.weight_files import GENERATOR, TEXT, metadata_of
from families.common.weight_source import local_weights
from families.common.weights import WeightsError
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.t5_layers import MAX_TOKENS, Projection, T5Texts
from warpcore.meta import are_only_shapes
from warpcore.text import brief, shortened

TEXT_PROJECTION, POOLED_PROJECTION = "t5_projection", "t5_pooled_projection"
T5_FOLDERS = ("t5_encoder", "text_encoder")
"""What pipelines call T5."""
PROJECTION = "text_projection_checkpoint_path"
PROJECTION_KEY = "text_projection"
"""Where a U-Net's file says whether that was a `file` or `random`."""
SCALE = "scaling_factor"
MAX_WIDTH = 2**16
"""Of the states that a U-Net reads: 32 times those of SDXL."""
_CONFIG_KEYS = {SCALE, "in_features", "out_features", "bias"}


def t5_texts(settings: SdSettings, unet: Mapping[str, Any], device: torch.device | str = "cpu") -> T5Texts:
    """T5 with its projections, for a U-Net of these constructor numbers.

    device: where matrices go to be put into four bits.

    Raises:
        UserError: files are missing, or for another network.
    """
    sees_pooled = settings.version.sees_sizes
    layers = {TEXT_PROJECTION: _number(unet, "cross_attention_dim")}
    if sees_pooled:
        of_sizes = 6 * _number(unet, "addition_time_embed_dim")
        layers[POOLED_PROJECTION] = _number(unet, "projection_class_embeddings_input_dim", of_sizes) - of_sizes
    t5 = _t5(settings, sees_pooled, device)
    made = {name: _projection(settings, name, t5.width, width) for name, width in layers.items()}
    return T5Texts(t5, made[TEXT_PROJECTION], made.get(POOLED_PROJECTION), settings.text_tokens)


def _number(unet: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A constructor number of a U-Net. Raises WeightsError where it is none, not above `least`, or far too large."""
    if type(unet.get(name)) is not int or not least < unet[name] <= least + MAX_WIDTH:
        raise WeightsError(
            f"{GENERATOR}: its {name} is {brief(unet.get(name))}, not a number above {least} and up to "
            f"{least + MAX_WIDTH}: check its config.json"
        )
    return unet[name]


def t5_files(settings: SdSettings) -> list[Path]:
    """The files and folders that text conditions depend on."""
    place = t5_source(settings)
    found = [place, place / CONFIG] if (place / CONFIG).is_file() else [place]
    folders = (projection_folder(settings, name) for name in (TEXT_PROJECTION, POOLED_PROJECTION))
    return found + [file for folder in folders if folder for file in (folder, folder / CONFIG) if file.exists()]


def t5_source(settings: SdSettings) -> Path:
    """The file or folder of T5; what is only on the hub is downloaded, but for shapes alone."""
    base = settings.generator_checkpoint_path
    given = settings.text_encoder_checkpoint_path or t5_beside(base) or settings.version.t5
    place = given if are_only_shapes() else local_weights(given, TEXT)
    return t5_beside(place) or component_folder(place, T5_FOLDERS[1])


def t5_beside(base: Path | None) -> Path | None:
    """The folder of T5 in a pipeline's; None where it has none."""
    if base is None:
        return None
    folders = [base / name for name in T5_FOLDERS if (base / name / CONFIG).is_file()]
    return next((folder for folder in folders if read_config(folder, TEXT).get("model_type") == "t5"), None)


def _t5(settings: SdSettings, sees_pooled: bool, device: torch.device | str) -> T5TextEncoder:
    place = t5_source(settings)
    options = {
        "precision": settings.text_encoder_precision, "device": device, "key": TEXT,
        "length": settings.text_tokens if sees_pooled else MAX_TOKENS, "padding": "states" if sees_pooled else "zeros",
    }  # fmt: skip
    if are_only_shapes() and not place.exists():
        return T5TextEncoder.of(T5_XXL, StandInTokenizer(), dict, place, **options)
    beside = place.with_name("tokenizer")
    tokenizer = beside if place.name in T5_FOLDERS and beside.is_dir() else None
    return T5TextEncoder.load(place, tokenizer, **options)


def projection_folder(settings: SdSettings, name: str) -> Path | None:
    """Where a projection is; None where it is made of random numbers.

    Raises:
        WeightsError: the folder that a key names has none.
    """
    given, base = settings.text_projection_checkpoint_path, settings.generator_checkpoint_path
    if given is None:
        if base is not None and (base / name).is_dir():
            return base / name
        if said_of_projection(base) == "file":
            raise WeightsError(
                f"{GENERATOR}: {base} was trained with a projection of T5's states; name the folder that holds it: "
                f"{PROJECTION}"
            )
        return None
    if (given / name).is_dir():
        return given / name
    if name == POOLED_PROJECTION and not settings.version.sees_sizes:
        return None
    if name == TEXT_PROJECTION and (given / CONFIG).is_file() and not settings.version.sees_sizes:
        return given
    raise WeightsError(f"{PROJECTION}: {given} holds no folder {name}; name a pipeline with T5 that has one")


def said_of_projection(base: Path | None) -> str | None:
    """What the file or folder of a U-Net says of its projection, `file` or `random`; None where it says nothing."""
    if base is None or not base.is_dir():
        return None if base is None else metadata_of(base).get(PROJECTION_KEY)
    return (read_config(component_folder(base, "unet"), GENERATOR) or {}).get(f"_{PROJECTION_KEY}")


def kind_of_projection(settings: SdSettings) -> str:
    """What a U-Net's file says of the projection that it was trained with, `file` or `random`: that of the settings,
    else what their file says."""
    base = settings.generator_checkpoint_path
    said = None if settings.text_projection_checkpoint_path else said_of_projection(base)
    return said or ("file" if projection_folder(settings, TEXT_PROJECTION) else "random")


def _projection(settings: SdSettings, name: str, inputs: int, outputs: int) -> Projection:
    if are_only_shapes():
        with torch.device("meta"):
            return Projection(inputs, outputs)
    folder = projection_folder(settings, name)
    if folder is None:
        layer = Projection(inputs, outputs)
        layer.draw(name)
        return layer
    key = PROJECTION if settings.text_projection_checkpoint_path else GENERATOR
    scale = _scale(read_config(folder, key) or {}, folder, key)
    tensors = read_tensors(folder, key)
    # Of one layer, whatever it is called in the module that was saved: NAME.weight and NAME.bias.
    parts = {tensor.rpartition(".")[0] for tensor in tensors}
    if len(parts) == 1:
        tensors = {tensor.rpartition(".")[2]: value for tensor, value in tensors.items()}
    with torch.device("meta"):
        layer = Projection(inputs, outputs, "bias" in tensors, scale)
    fill(layer, tensors, folder, key, torch.float32)
    return layer


def _scale(config: Mapping[str, Any], folder: Path, key: str) -> float:
    unknown = sorted(name for name in config if not name.startswith("_") and name not in _CONFIG_KEYS)
    if unknown:
        raise WeightsError(
            f"{key}: {folder / CONFIG} has {shortened(unknown[0])}, which is not known here; a projection is one "
            f"linear layer times {SCALE}"
        )
    scale = config.get(SCALE, 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise WeightsError(f"{key}: {folder / CONFIG}: {SCALE} is {brief(scale)}, not a number")
    return float(scale)
