"""The autoencoder whose latents DiT and PixArt draw: sd-vae-ft-ema, or the mini that ships."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from families.common.autoencoders import SD_AUTOENCODER, Autoencoder, LatentScale
from families.common.library_files import CONFIG, component_folder, read_config, read_tensors
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import local_weights
from families.common.weights import WeightsError
from families.dit.config import LatentSettings
from warpcore.meta import are_only_shapes
from warpcore.text import brief

PUBLISHED = SD_AUTOENCODER | {"scaling_factor": 0.18215, "sample_size": 256, "force_upcast": False}
"""Constructor numbers of sd-vae-ft-ema."""


def autoencoder(settings: LatentSettings) -> Autoencoder:
    """The autoencoder, in its own precision.

    Raises:
        UserError: it is missing, damaged, or makes other latents than the denoiser reads.
    """
    path, config = autoencoder_source(settings), autoencoder_numbers(settings)
    made, wanted = config.get("latent_channels", 4), settings.version.network["in_channels"]
    if made != wanted:
        raise WeightsError(
            f"{AUTOENCODER}: latents of {path} have {brief(made)} channels, and a denoiser of model_version: "
            f"{settings.model_version} reads {wanted}: name the autoencoder that it was trained with"
        )
    tensors = partial(read_tensors, path, AUTOENCODER)
    return Autoencoder.of(config, tensors, path, AUTOENCODER, precision=settings.autoencoder_precision)


def autoencoder_source(settings: LatentSettings) -> Path:
    """The file or folder of the autoencoder; what is only on the hub is downloaded, but for shapes alone."""
    given = settings.autoencoder_checkpoint_path or Path(settings.version.autoencoder)
    return component_folder(given if are_only_shapes() else local_weights(given, AUTOENCODER), "vae")


def autoencoder_numbers(settings: LatentSettings) -> Mapping[str, Any]:
    """Its constructor numbers; its weights are not read."""
    path = autoencoder_source(settings)
    found = read_config(path, AUTOENCODER) if path.exists() or not are_only_shapes() else None
    return PUBLISHED if found is None else found


def latents_of(settings: LatentSettings) -> tuple[LatentScale, int]:
    """The scale of its latents, and the pixels per position and side."""
    config = autoencoder_numbers(settings)
    return LatentScale.of(config), Autoencoder.compression_of(config)


def autoencoder_files(settings: LatentSettings) -> list[Path]:
    """What cached moments depend on: its weights, and its config."""
    place = autoencoder_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]
