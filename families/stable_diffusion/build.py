"""Build the networks of Stable Diffusion with their weights, and its diffusion process."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families.common.autoencoders import Autoencoder, LatentScale
from families.common.library_files import CONFIG, construct, fill
from families.common.library_networks import adapt
from families.common.text_encoders import ClipTextEncoder, ClipTextEncoders, public_tokenizer
from families.common.weight_files import AUTOENCODER, GENERATOR, TEXT
from families.common.weights import WeightsError
from families.stable_diffusion.components import SKIP_KEY, ZERO_SNR_KEY, Component, find_component, holds
from families.stable_diffusion.config import SdConfig, SdSettings
from families.stable_diffusion.t5_layers import T5Texts
from families.stable_diffusion.t5_texts import t5_files, t5_texts
from families.stable_diffusion.versions import VERSIONS
from warpcore.config import ConfigError
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.times import Spacing, flow_times, sampling_times
from warpcore.errors import UserError
from warpcore.meta import are_only_shapes
from warpcore.text import brief, shortened


def unet(settings: SdSettings, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The U-Net as the engine wants it; random weights where the settings name no file."""
    from diffusers import UNet2DConditionModel

    found, config = generator_source(settings), unet_config(settings)
    if found is None and not are_only_shapes():
        return nn.Module.to(adapt(construct(UNet2DConditionModel, config, GENERATOR)), dtype)
    with torch.device("meta"):
        network = construct(UNet2DConditionModel, config, GENERATOR)
    if not are_only_shapes():
        fill(network, found.tensors(), found.path, GENERATOR, dtype, deferrable=True)
    return nn.Module.to(adapt(network), dtype)  # not its own `to`, which warns of every change


def unet_config(settings: SdSettings) -> Mapping[str, Any]:
    """The constructor numbers of the U-Net."""
    found = generator_source(settings)
    return (found and found.config) or settings.version.unet


def generator_source(settings: SdSettings) -> Component | None:
    """The U-Net in `generator_checkpoint_path`; None without one, or where it may be missing.

    Raises:
        WeightsError: it is of another `model_version`.
    """
    path = settings.generator_checkpoint_path
    if path is None or (are_only_shapes() and not path.exists()):
        return None
    found, version = find_component(path, "unet", GENERATOR), settings.version
    if found.version is not None and (found.version == "sdxl") != version.sees_sizes:
        said = shortened(found.version)
        title = {"sdxl": "SDXL", "sd15": "Stable Diffusion 1.5"}.get(said, said)
        raise WeightsError(f"{GENERATOR}: {path} is {title}; write model_version: {said}, or name other weights")
    if found.text_model == "t5" and settings.text_model == "clip" and settings.text_encoder_checkpoint_path is None:
        raise WeightsError(f"{GENERATOR}: {path} was trained with T5; write text_model: t5, or name other weights")
    return found


def autoencoder(settings: SdSettings) -> Autoencoder:
    """The autoencoder, in its own precision."""
    found = autoencoder_source(settings)
    config = found.config or _autoencoder_numbers(settings, found)
    made, wanted = config.get("latent_channels", 4), unet_config(settings).get("in_channels", 4)
    if made != wanted:
        raise WeightsError(
            f"{AUTOENCODER}: latents of {found.path} have {brief(made)} channels, and the U-Net reads "
            f"{brief(wanted)}: name the autoencoder that the U-Net was trained with"
        )
    return Autoencoder.of(config, found.tensors, found.path, AUTOENCODER, precision=settings.autoencoder_precision)


def autoencoder_by_itself(path: Path, version: str | None = None, any_scale: bool = False, **options) -> Autoencoder:
    """The autoencoder of a folder, of a checkpoint in one file, or of a file of its own, whatever U-Net it is for.

    Args:
        version: which one it is, where its file does not say it.
        any_scale: nothing depends on the scale of its latents.
        options: see `Autoencoder`.

    Raises:
        WeightsError: nothing says which one it is: files of Stable Diffusion 1.5's and of SDXL's are alike.
    """
    if path.is_dir():
        return Autoencoder.load(path, key=AUTOENCODER, **options)
    found = find_component(path, "vae", AUTOENCODER)
    version = found.version or version or ("sd15" if any_scale else None)
    if found.config is None and version not in VERSIONS:
        raise WeightsError(
            f"{AUTOENCODER}: {path} does not say which autoencoder it is: those of Stable Diffusion 1.5 and of SDXL "
            "are alike but for the scale of their latents. Write autoencoder_version: sd15 or sdxl"
        )
    config = found.config or VERSIONS[version].autoencoder
    return Autoencoder.of(config, found.tensors, path, AUTOENCODER, **options)


def autoencoder_source(settings: SdSettings) -> Component:
    """Where the autoencoder is."""
    return _part(settings, "vae", AUTOENCODER, settings.version.autoencoder_file)


def latents_of(settings: SdSettings) -> tuple[LatentScale, int]:
    """The scale of the autoencoder's latents, and the pixels per position and side; its weights are not read."""
    found = autoencoder_source(settings)
    config = found.config or _autoencoder_numbers(settings, found)
    return LatentScale.of(config), Autoencoder.compression_of(config)


def _autoencoder_numbers(settings: SdSettings, found: Component) -> Mapping[str, Any]:
    """The constructor numbers of an autoencoder whose file does not say them, but maybe which one it is."""
    said = settings.autoencoder_version or found.version
    return VERSIONS[said if said in VERSIONS else settings.model_version].autoencoder


def text_encoders(settings: SdSettings, device: torch.device | str = "cpu") -> ClipTextEncoders | T5Texts:
    """The text encoders as one network: hidden states (B, L, D), and SDXL's pooled states (B, P)."""
    if settings.text_model == "t5":
        return t5_texts(settings, unet_config(settings), device)
    encoders = _encoders(settings, device)
    width, wanted = sum(encoder.width for encoder in encoders), unet_config(settings).get("cross_attention_dim")
    if isinstance(wanted, int) and width != wanted:
        raise WeightsError(
            f"{TEXT}: the states of these text encoders are {width} wide, and the U-Net reads {wanted}: name the text "
            "encoders that the U-Net was trained with"
        )
    return ClipTextEncoders(encoders, zeros_for_empty=len(settings.version.text) > 1, chunks=settings.text_chunks)


def _encoders(settings: SdSettings, device: torch.device | str) -> list[ClipTextEncoder]:
    version, encoders, hidden = settings.version, [], settings.version.hidden
    if settings.clip_skip is not None:
        hidden = replace(hidden, skip_layers=settings.clip_skip - 1)
    if not version.text:  # the shipped tower of the mini, or another in its place
        path = settings.text_encoder_checkpoint_path or version.text_file
        return [
            ClipTextEncoder.load(
                path, hidden=hidden, precision=settings.text_encoder_precision, device=device, key=TEXT
            )
        ]
    for number, (config, padding) in enumerate(zip(version.text, version.padding, strict=True), start=1):
        found = _part(settings, "text_encoder" if number == 1 else f"text_encoder_{number}", TEXT, None)
        encoders.append(ClipTextEncoder.of(
            found.config or config, found.tokenizer or public_tokenizer(padding), found.tensors, found.path,
            hidden, settings.text_encoder_precision, device, TEXT,
        ))  # fmt: skip
    return encoders


def network_files(settings: SdSettings, network: str) -> list[Path]:
    """What the features of a network depend on: the file or folder with the weights of the `autoencoder` (its scale is
    applied later), or those of the `text` encoders, which are one network, and their configs."""
    if network == "autoencoder":
        return [autoencoder_source(settings).path]
    if settings.text_model == "t5":
        return t5_files(settings)
    if not settings.version.text:
        return [settings.text_encoder_checkpoint_path or settings.version.text_file]
    names = ["text_encoder", "text_encoder_2"][: len(settings.version.text)]
    places = dict.fromkeys(_part(settings, name, TEXT, None).path for name in names)
    return [file for place in places for file in (place, place / CONFIG) if file == place or file.is_file()]


def with_zero_terminal_snr(settings: SdConfig, about: Mapping[str, str] | None) -> SdConfig:
    """The config with `zero_terminal_snr`: of the checkpoint that is resumed, else of the weights to start from.

    about: what the files of the checkpoint say of themselves, None in a new run.

    Raises:
        ConfigError: a new run's config contradicts its weights.
    """
    given, found = settings.zero_terminal_snr, None if about is not None else generator_source(settings)
    said = found.zero_terminal_snr if found else (about or {}).get(ZERO_SNR_KEY, None)
    said = said == "true" if isinstance(said, str) else said
    if found and None not in (given, said) and given != said and not settings.change_target:
        raise ConfigError(
            f"zero_terminal_snr: {str(given).lower()} contradicts {found.path}, which was trained with "
            f"{str(said).lower()}. Leave the key out, or write change_target: true to teach the network the other"
        )
    return settings.model_copy(update={ZERO_SNR_KEY: bool(said if given is None else given)})


def with_clip_skip(settings: SdConfig, about: Mapping[str, Any] | None) -> SdConfig:
    """The settings with what the U-Net's file says of CLIP's hidden states, where they say nothing.

    about: what the checkpoint of a resumed run says of itself.
    """
    if settings.clip_skip is not None or settings.text_model == "t5":
        return settings
    path = settings.generator_checkpoint_path  # which need not be there for a cache
    found = generator_source(settings) if about is None and path is not None and path.exists() else None
    said = found and found.clip_skip if about is None else about.get(SKIP_KEY)
    return settings.model_copy(update={SKIP_KEY: said and int(said)})


def process(settings: SdSettings, loss_weight: str = "constant", offset_noise: float = 0.0, **flow: float) -> GDF:
    """The diffusion process of 1,000 timesteps, or for `rectified_flows` a straight flow.

    flow: other arguments of `flow_process`.
    """
    if settings.diffusion_target == "rectified_flows":
        return flow_process(loss_weight, offset_noise=offset_noise, **flow)
    return discrete_process(
        "scaled_linear", settings.diffusion_target or "epsilon", loss_weight, offset_noise=offset_noise,
        zero_terminal_snr=bool(settings.zero_terminal_snr),
    )  # fmt: skip


def sampling_process(
    settings: SdSettings, steps: int, sampler: str, *, shift: float = 1.0, spacing: Spacing | None = None,
    karras: bool = False,
) -> tuple[GDF, Tensor]:  # fmt: skip
    """The diffusion process that drawings follow, and the times (N + 1,) of the steps of a sampler.

    Raises:
        UserError: `karras` or `spacing` of a straight flow; see `sampling_times`.
    """
    diffusion = process(settings)
    if not isinstance(diffusion.schedule, TableSchedule):
        if karras or spacing is not None:
            key = "karras" if karras else "timestep_spacing"
            raise UserError(f"{key}: a straight flow (rectified_flows) has no timesteps to choose; remove it")
        return diffusion, flow_times(steps, shift=shift)
    return diffusion, sampling_times(diffusion.schedule, steps, sampler, spacing=spacing, karras=karras)


def _part(settings: SdSettings, name: str, key: str, default: Path | None) -> Component:
    """A network beside the U-Net: where its key says, else with the U-Net, else the default."""
    given, base = getattr(settings, key), settings.generator_checkpoint_path
    with_unet = base is not None and (base.exists() or not are_only_shapes()) and holds(base, name, key)
    place = given or (base if with_unet else default)
    if are_only_shapes() and (place is None or not place.exists()):
        return Component(place or Path(name), dict)  # what the version says is all that is known
    if place is None:
        there = f"{GENERATOR} {base} holds none" if base else f"there is no {GENERATOR}"
        raise WeightsError(
            f"{key} is missing, and {there}: name a pipeline of diffusers, a checkpoint in one file, or the folder of "
            "that network"
        )
    return find_component(place, name, key)
