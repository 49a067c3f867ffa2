"""Build the networks of Cosmos-Predict2 with their weights, and its diffusion process."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from families.common.autoencoders import Autoencoder, LatentScale
from families.common.library_files import CONFIG, construct, fill
from families.common.random_start import random_start
from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.wan_autoencoder import CONSTRUCTOR, LIBRARY_CLASS, WanAutoencoder
from families.common.weight_files import AUTOENCODER, GENERATOR, TEXT
from families.common.weights import WeightsError
from families.cosmos.components import (
    Component,
    check_version,
    find_autoencoder,
    find_beside,
    find_text_encoder,
    find_transformer,
)
from families.cosmos.config import CosmosSettings
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import flow_process
from warpcore.meta import are_only_shapes
from warpcore.text import brief

LIBRARY_DEFAULTS = {"in_channels": 16, "text_embed_dim": 1024, "patch_size": (1, 2, 2), "max_size": (128, 240, 240)}
"""Of the numbers of a denoiser that are looked at before it is built."""


def transformer(settings: CosmosSettings, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser as the engine wants it; random weights where the settings name no file."""
    from families.cosmos.transformer import CosmosTransformer3DModel

    found = generator_source(settings)
    config = settings.version.transformer if found is None else found.config
    if found is None and not are_only_shapes():
        build = partial(construct, CosmosTransformer3DModel, config, GENERATOR)
        return nn.Module.to(_adapted(random_start(build, initialise, dtype)), dtype)
    with torch.device("meta"):
        network = construct(CosmosTransformer3DModel, config, GENERATOR)
    if not are_only_shapes():
        fill(network, found.tensors(), found.path, GENERATOR, dtype, deferrable=True)
    return nn.Module.to(_adapted(network), dtype)


def _adapted(network: nn.Module) -> nn.Module:
    from families.cosmos.transformer import adapted

    network.initialise_layer = initialise
    return adapted(network)


def initialise(name: str, layer: nn.Module) -> None:
    """Random weights as the published program has them, instead of the library's: linear layers truncated normal with
    deviation 1 / sqrt(fan-in), the second matrices of the blocks' modulations zero, norms one."""
    if not isinstance(layer, nn.Linear):
        for parameter in layer.parameters(recurse=False):
            nn.init.ones_(parameter)
    elif ".norm" in name and name.endswith("linear_2"):
        nn.init.zeros_(layer.weight)
    else:
        deviation = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-3 * deviation, b=3 * deviation)


def generator_source(settings: CosmosSettings) -> Component | None:
    """The denoiser in `generator_checkpoint_path`; None without one, or where it may be missing.

    Raises:
        WeightsError: it is of another `model_version`.
    """
    path = settings.generator_checkpoint_path
    if path is None or (are_only_shapes() and not path.exists()):
        return None
    found = find_transformer(path, GENERATOR, settings.takes_average)
    check_version(found, settings.model_version, GENERATOR)
    return found


def transformer_numbers(settings: CosmosSettings) -> Mapping[str, Any]:
    """The constructor numbers of the denoiser; its weights are not read."""
    found = generator_source(settings)
    return settings.version.transformer if found is None else LIBRARY_DEFAULTS | dict(found.config)


def autoencoder(settings: CosmosSettings) -> Autoencoder:
    """The autoencoder, in its own precision."""
    found, kind, config = _autoencoder(settings)
    return kind.of(config, found.tensors, found.path, AUTOENCODER, precision=settings.autoencoder_precision)


def autoencoder_source(settings: CosmosSettings) -> Component:
    """Where the autoencoder is."""
    return _part(settings, "vae", AUTOENCODER, settings.version.autoencoder_file)


def latents_of(settings: CosmosSettings) -> tuple[LatentScale, int]:
    """The scale of the autoencoder's latents, and the pixels per position and side; its weights are not read."""
    _, kind, config = _autoencoder(settings)
    return kind.scale_of(config), kind.compression_of(config)


def autoencoder_by_itself(path: Path, **options: Any) -> Autoencoder:
    """The autoencoder of a folder or file; a file that says nothing of itself is one of the published network, and one
    that says numbers without a class is an AutoencoderKL, as this project writes them.

    options: see `Autoencoder`.
    """
    found = find_autoencoder(path, AUTOENCODER)
    kind, config = _kind_of(found, None if found.config else CONSTRUCTOR)
    return kind.of(config, found.tensors, found.path, AUTOENCODER, **options)


def _autoencoder(settings: CosmosSettings) -> tuple[Component, type[Autoencoder], Mapping[str, Any]]:
    found = autoencoder_source(settings)
    return found, *_kind_of(found, settings.version.autoencoder)


def _kind_of(found: Component, default: Mapping[str, Any] | None) -> tuple[type[Autoencoder], Mapping[str, Any]]:
    """Of an autoencoder the class, and its constructor numbers; default: those where nothing says them."""
    said = (found.config or {}).get("_class_name", LIBRARY_CLASS if default is not None else None)
    return WanAutoencoder if said == LIBRARY_CLASS else Autoencoder, found.config or default or {}


def text_encoder(settings: CosmosSettings, device: torch.device | str = "cpu") -> T5TextEncoder:
    """The text encoder, whose condition of the empty text is zeros."""
    found, version = _part(settings, "text_encoder", TEXT, settings.version.text_file), settings.version
    options = {"length": version.text_length, "zeros_for_empty": True, "precision": settings.text_encoder_precision}
    if are_only_shapes() and found.config is None:
        return T5TextEncoder.of(version.text, StandInTokenizer(), found.tensors, found.path, key=TEXT, **options)
    return T5TextEncoder.load(found.path, found.tokenizer, device=device, key=TEXT, **options)


def check_fits(settings: CosmosSettings, *networks: str) -> None:
    """Compare the `autoencoder` or the `text` encoder with the denoiser; weights are not read.

    Raises:
        WeightsError: latents, or the states of texts, are of another width than the denoiser reads.
    """
    numbers, widths = transformer_numbers(settings), {}
    if "autoencoder" in networks:
        found, kind, config = _autoencoder(settings)
        widths["in_channels"] = AUTOENCODER, found.path, kind.channels_of(config), "channels of latents"
    if "text" in networks:
        found = _part(settings, "text_encoder", TEXT, settings.version.text_file)
        width = (found.config or settings.version.text).get("d_model")
        widths["text_embed_dim"] = TEXT, found.path, width, "numbers for each token"
    for name, (key, path, own, what) in widths.items():
        if own != numbers[name]:
            raise WeightsError(
                f"{key}: {path} gives {brief(own)} {what}, but the denoiser reads {brief(numbers[name])}: name the "
                "network that it was trained with"
            )


def network_files(settings: CosmosSettings, network: str) -> list[Path]:
    """What the features of the `autoencoder` or of the `text` encoder depend on: its weights, and its config; nothing
    where no text encoder is named: texts from a cache need none."""
    if network == "text" and _is_without_text_encoder(settings):
        return []
    if network == "autoencoder":
        place = autoencoder_source(settings).path
    else:
        place = _part(settings, "text_encoder", TEXT, settings.version.text_file).path
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]


def _is_without_text_encoder(settings: CosmosSettings) -> bool:
    base = settings.generator_checkpoint_path
    named = settings.text_encoder_checkpoint_path or settings.version.text_file
    return named is None and (base is None or find_beside(base, "text_encoder", TEXT) is None)


def process(settings: CosmosSettings, loss_weight: str = "constant", offset_noise: float = 0.0) -> GDF:
    """The straight flow, whose network is told the noise's share from 0 to 1."""
    logit_normal = getattr(settings, "timestep_sampling", "logit_normal") == "logit_normal"
    return flow_process(loss_weight, steps=1, logit_normal=logit_normal, offset_noise=offset_noise)


def _part(settings: CosmosSettings, name: str, key: str, default: Path | None) -> Component:
    """A network beside the denoiser: where its key says, else beside the denoiser, else the default."""
    find = find_autoencoder if name == "vae" else find_text_encoder
    given, base = getattr(settings, key), settings.generator_checkpoint_path
    if given is None and base is not None and (found := find_beside(base, name, key)) is not None:
        return found
    place = given or default
    if are_only_shapes() and (place is None or not place.exists()):
        return Component(place or Path(name), dict)  # what the version says is all that is known
    if place is None:
        there = f"none stands beside {base}" if base else f"there is no {GENERATOR}"
        example = "tokenizer/tokenizer.pth" if name == "vae" else "google-t5/t5-11b"
        raise WeightsError(f"{key} is missing, and {there}: name one, such as {example}")
    return find(place, key)
