"""Build the networks of PixArt-alpha with their weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from families.common.caption_cleaning import clean_caption, lower_case
from families.common.library_files import CONFIG, Component, component_folder, construct, fill, read_config
from families.common.library_networks import adapt
from families.common.random_start import random_start
from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.weight_files import GENERATOR, TEXT
from families.common.weight_source import local_weights
from families.common.weights import WeightsError
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_files import find_denoiser, text_length_of
from families.dit.pixart_versions import VERSIONS, version_of
from warpcore.meta import are_only_shapes

BLOCKS = ["BasicTransformerBlock"]


def denoiser(settings: PixartSettings, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser as the engine wants it; random weights where the settings name no file.

    Raises:
        UserError: the file is missing, damaged, or of another network than the settings say.
    """
    from families.dit.pixart_transformer import PixArtTransformer2DModel, initialise

    found, length = denoiser_source(settings), settings.version.text_length
    if found is None:
        build = partial(
            construct, partial_named(PixArtTransformer2DModel, length), settings.version.network, GENERATOR
        )
        if not are_only_shapes():
            return nn.Module.to(_adapted(random_start(build, initialise, dtype)), dtype)
        with torch.device("meta"):
            return nn.Module.to(_adapted(build()), dtype)
    tensors = found.tensors() if found.path.exists() else {}
    length = text_length_of(tensors)
    check_text(length, found.path, settings)
    with torch.device("meta"):
        network = construct(partial_named(PixArtTransformer2DModel, length), found.config, GENERATOR)
    if not are_only_shapes():
        fill(network, tensors, found.path, GENERATOR, dtype, deferrable=True)
    return nn.Module.to(_adapted(network), dtype)


def _adapted(network: nn.Module) -> nn.Module:
    from families.dit.pixart_transformer import initialise

    network.initialise_layer = initialise
    return adapt(network, BLOCKS, token_arguments={})


def partial_named(kind: type, text_length: int | None):
    """A constructor with a length of texts, which goes by the name of its class."""
    made = partial(kind, text_length)
    made.__name__ = kind.__name__
    return made


def denoiser_source(settings: PixartSettings) -> Component | None:
    """The denoiser in `generator_checkpoint_path`; None without one, or where it may be missing.

    Raises:
        WeightsError: it is of another `model_version`.
    """
    path = settings.generator_checkpoint_path
    if path is None or (are_only_shapes() and not path.exists()):
        return None
    found = find_denoiser(path, GENERATOR)
    own, chosen = version_of(found.config), settings.model_version
    if own is not None and own != chosen:
        raise WeightsError(f"{GENERATOR}: {path} is PixArt-{own}; write model_version: {own}")
    asked = VERSIONS[chosen].network["use_additional_conditions"]
    if bool(found.config.get("use_additional_conditions", found.config.get("sample_size", 128) == 128)) != asked:
        raise WeightsError(
            f"{GENERATOR}: {path} is {'' if not asked else 'not '}told the sizes of pictures, unlike PixArt-{chosen} "
            "(model_version)"
        )
    return found


def check_text(length: int | None, path: Path, settings: PixartSettings) -> None:
    """Raise WeightsError where the empty text of a file has another length than texts have here."""
    wanted = settings.version.text_length
    if length not in (None, wanted):
        raise WeightsError(
            f"{GENERATOR}: the empty text of {path} has {length} tokens, and PixArt-{settings.model_version} reads "
            f"{wanted}"
        )


def network_numbers(settings: PixartSettings) -> Mapping[str, Any]:
    """The constructor numbers of the denoiser; its weights are not read."""
    found = denoiser_source(settings)
    return settings.version.network if found is None else dict(settings.version.network) | dict(found.config)


def text_source(settings: PixartSettings) -> Path:
    """The file or folder of the text encoder; what is only on the hub is downloaded, but for shapes alone."""
    given = settings.text_encoder_checkpoint_path or Path(settings.version.text_encoder)
    return component_folder(given if are_only_shapes() else local_weights(given, TEXT), "text_encoder")


def text_encoder(settings: PixartSettings, device: torch.device | str = "cpu") -> T5TextEncoder:
    """The text encoder, in its own precision; states behind the end of a text are zeros, which masks hide."""
    path, version = text_source(settings), settings.version
    options = {
        "precision": settings.text_encoder_precision, "key": TEXT, "length": version.text_length,
        "clean": {True: clean_caption, False: lower_case, None: str}[settings.clean_captions],
    }  # fmt: skip
    if are_only_shapes() and version.text is not None and (not path.exists() or read_config(path, TEXT) is None):
        return T5TextEncoder.of(version.text, StandInTokenizer(), dict, path, device=device, **options)
    encoder = T5TextEncoder.load(path, device=device, **options)
    if encoder.width != (wanted := network_numbers(settings)["caption_channels"]):
        raise WeightsError(f"{TEXT}: states of {path} are {encoder.width} wide, and the denoiser reads {wanted}: name "
                           "the text encoder that it was trained with")  # fmt: skip
    return encoder


def text_files(settings: PixartSettings) -> list[Path]:
    """What cached texts depend on: the text encoder's weights, and its config."""
    place = text_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]
