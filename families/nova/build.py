"""Build NOVA's transformer and its text encoder with their weights, and its diffusion process."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families.common.library_files import CONFIG, construct, fill, read_config
from families.common.loaded_text import FOLDER
from families.common.random_start import RandomWeights, random_start
from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.weight_files import GENERATOR, TEXT
from families.common.weights import WeightsError
from families.nova import loss
from families.nova.autoencoder import latents_of
from families.nova.components import part_of
from families.nova.config import NovaSettings
from families.nova.files import check_mixer, config_said, lacking_of_clips, read_nova
from families.nova.text import PHI_2, PhiTextEncoder
from families.nova.versions import FLOW, classes_of, of_classes, stretched, version_of
from modules.nova import NOVATransformer
from warpcore.diffusion.diffusion import GDF
from warpcore.meta import are_only_shapes

logger = logging.getLogger(__name__)

TextEncoder = PhiTextEncoder | T5TextEncoder


def network(
    settings: NovaSettings,
    size_px: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    from_pictures: bool = False,
) -> NOVATransformer:
    """The transformer, with places for pictures or frames of `size_px` (H, W), by default those of its version; random
    weights where the settings name no file.

    from_pictures: one of clips may begin with weights of pictures, its further parts as in a new network.

    Raises:
        WeightsError: the file is missing, damaged, or of another network than the settings say.
    """
    path, numbers = settings.generator_checkpoint_path, network_numbers(settings, size_px)
    build = partial(construct, NOVATransformer, numbers, GENERATOR)
    if path is None and not are_only_shapes():
        return random_start(build, initialise, dtype).to(dtype)
    with torch.device("meta"):
        made = build()
    if not are_only_shapes():
        check_network(config_said(path, GENERATOR), settings, from_pictures)
        tensors = read_nova(path, GENERATOR)
        if from_pictures:
            tensors |= _parts_of_clips(made, tensors, path)
        check_mixer(tensors, settings.video_mixer_rank, path, GENERATOR)
        fill(made, tensors, path, GENERATOR, dtype, deferrable=True)
    return made.to(dtype)


def _parts_of_clips(network: NOVATransformer, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """First values of what the weights of a network of pictures lack, which is told; none where they are of clips."""
    lacking = lacking_of_clips(network.state_dict(), tensors)
    if not lacking:
        return {}
    parts = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in lacking))
    logger.warning("%s: %s is of pictures and has no %s: these start from scratch", GENERATOR, path, parts)
    new = RandomWeights(network, initialise, torch.initial_seed())
    return {name: new[name] for name in lacking}


def initialise(name: str, layer: nn.Module) -> None:
    """Give a layer of a new network PyTorch's usual values, and its tokens small ones."""
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()


def network_numbers(settings: NovaSettings, size_px: Sequence[int] | None = None) -> dict[str, Any]:
    """The constructor numbers of the transformer for pictures, or frames, of `size_px` (H, W).

    Clips are stretched to as many frames as the settings' weights say, if they are of clips and say it.
    """
    version, path = settings.version, settings.generator_checkpoint_path
    said = config_said(path, GENERATOR) if path is not None and path.exists() else None
    numbers, frames = dict(version.network), stretched(said or {})
    rows, columns = (side // token_px(settings) for side in size_px or version.size_px)
    if version.is_published:
        numbers |= {"image_size": [side * token_px(settings) for side in (rows, columns)]}
    numbers = numbers if settings.num_classes is None else of_classes(numbers, settings.num_classes)
    return numbers | {
        "image_base_size": [rows, columns],
        "video_base_size": [frames if frames > 1 else stretched(numbers), rows // 2, columns // 2],
        "video_mixer_rank": settings.video_mixer_rank or None,
        "rotary_pos_embed": settings.rotary_pos_embed,
    }


def token_px(settings: NovaSettings) -> int:
    """Pixels per token and side."""
    return latents_of(settings)[1] * patch_of(settings.version.network)


def patch_of(numbers: Mapping[str, Any]) -> int:
    """Latent positions per token and side."""
    return 15 // numbers["image_stride"] + 1


def check_network(config: Mapping[str, Any] | None, settings: NovaSettings, from_pictures: bool = False) -> None:
    """Raise WeightsError where the network of a file is another one than the settings say, and say what to write.

    config: what the file says of itself, if anything. from_pictures: see `network`.
    """
    if config is None:
        return
    if from_pictures and settings.version.draws_clips and stretched(config) == 1:
        grown = dict(config) | {"video_base_size": settings.version.network["video_base_size"]}
        grown["video_mixer_rank"] = config.get("video_mixer_rank") or settings.video_mixer_rank
        config = grown if version_of(grown) == settings.model_version else config
    path, found = settings.generator_checkpoint_path, version_of(config)
    if found is not None and found != settings.model_version:
        raise WeightsError(f"{GENERATOR}: {path} is NOVA's {found}; write model_version: {found}")
    own = {name: config.get(name) or none for name, none in (("video_mixer_rank", 0), ("rotary_pos_embed", False))}
    for name, there in (own | {"num_classes": classes_of(config)}).items():
        here = getattr(settings, name)
        if there != here:
            told = [f"{name}: {'null' if value is None else str(value).lower()}" for value in (there, here)]
            raise WeightsError(f"{GENERATOR}: {path} has {told[0]}, and this configuration {told[1]}: write {told[0]}")


def process(settings: NovaSettings, loss_weight: str = "constant") -> GDF:
    """The diffusion of single tokens; see `families.nova.loss.process`."""
    if settings.target == FLOW:
        return loss.process("flow", settings.shift, loss_weight)
    return loss.process("ddpm", loss_weight=loss_weight)


# ---------------------------------------------------------------- texts


def text_source(settings: NovaSettings) -> Path:
    """The folder, or file, of the text encoder; what is only on the hub is downloaded, but for shapes alone."""
    return part_of(settings, TEXT, FOLDER)


def text_encoder(settings: NovaSettings, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder, in its own precision: Phi-2, or a T5.

    Raises:
        UserError: it is missing or damaged, or its states are of another width than the network reads.
    """
    path, version = text_source(settings), settings.version
    options = {"precision": settings.text_encoder_precision, "key": TEXT, "length": version.text_length}
    config = read_config(path, TEXT) if path.exists() or not are_only_shapes() else None
    if config is None and are_only_shapes():
        return PhiTextEncoder.of(PHI_2, StandInTokenizer(), dict, path, device=device, **options)
    kind = T5TextEncoder if (config or {}).get("model_type") == "t5" else PhiTextEncoder
    encoder = kind.load(path, device=device, **options)
    if encoder.width != (wanted := version.text_width):
        raise WeightsError(f"{TEXT}: states of {path} are {encoder.width} wide, and the network reads {wanted}: name "
                           "the text encoder that it was trained with")  # fmt: skip
    return encoder


def text_files(settings: NovaSettings) -> list[Path]:
    """What cached texts depend on: the text encoder's weights, and its config."""
    place = text_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]
