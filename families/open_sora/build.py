"""Build the networks of Open-Sora 1.2 with their weights, and its diffusion process."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from families.common.library_files import CONFIG, component_folder, construct, read_config
from families.common.random_start import random_start
from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.weight_files import GENERATOR, TEXT
from families.common.weight_source import local_weights
from families.common.weights import WeightsError, are_only_shapes, check_names
from families.open_sora.config import OpenSoraSettings
from families.open_sora.files import read_stdit3
from modules.stdit3 import STDiT3
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import flow_process
from warpcore.diffusion.schedules import shift_by_size
from warpcore.loading import assign

TIMESTEPS = 1000
"""What the network is told of pure noise."""


def network(settings: OpenSoraSettings, dtype: torch.dtype = torch.float32) -> STDiT3:
    """The denoiser; random weights where the settings name no file.

    Raises:
        WeightsError: the file is missing, damaged, or of another network than the settings say.
    """
    path, build = settings.generator_checkpoint_path, partial(construct, STDiT3, settings.version.network, GENERATOR)
    if path is None and not are_only_shapes():
        return random_start(build, initialise, dtype).to(dtype)
    with torch.device("meta"):
        made = build()
    if not are_only_shapes():
        tensors = read_stdit3(path, GENERATOR, settings.model_version)
        check_names(made.state_dict(), tensors, path, GENERATOR)
        assign(made, tensors, dtype, deferrable=True)
    return made.to(dtype)


def initialise(name: str, layer: torch.nn.Module) -> None:
    """See `STDiT3.initialise_layer`."""
    STDiT3.initialise_layer(name, layer)


def process(settings: OpenSoraSettings, loss_weight: str = "constant", offset_noise: float = 0.0) -> GDF:
    """The straight flow; the network is told 1,000 times the share of the noise, and predicts the way from it."""
    keys = {"logit_mean": getattr(settings, "logit_mean", 0.0), "logit_std": getattr(settings, "logit_std", 1.0)}
    logit_normal = getattr(settings, "timestep_sampling", "logit_normal") == "logit_normal"
    return flow_process(loss_weight, steps=TIMESTEPS, logit_normal=logit_normal, **keys, signalwards=True,
                        offset_noise=offset_noise)  # fmt: skip


def time_shift(settings: OpenSoraSettings, height: Tensor, width: Tensor, latent_frames: int) -> Tensor:
    """The shift (B,) of the times of clips, by their size (B,) in pixels and the frames of their latents."""
    if not settings.use_timestep_transform:
        return torch.ones_like(height, dtype=torch.float32)
    return shift_by_size(height, width, torch.full_like(height, latent_frames))


def drawing_shift(settings: OpenSoraSettings, size_px: Sequence[int], latent_frames: int) -> float:
    """The same of clips to draw, of `size_px` (T, H, W)."""
    height, width = (torch.tensor([side]) for side in size_px[1:])
    return time_shift(settings, height, width, latent_frames).item()


def text_source(settings: OpenSoraSettings) -> Path:
    """The file or folder of the text encoder; what is only on the hub is downloaded, but for shapes alone."""
    given = settings.text_encoder_checkpoint_path or Path(settings.version.text_encoder)
    return component_folder(given if are_only_shapes() else local_weights(given, TEXT), "text_encoder")


def text_encoder(settings: OpenSoraSettings, device: torch.device | str = "cpu") -> T5TextEncoder:
    """The text encoder, in its own precision; states behind the end of a text are zeros, which masks hide."""
    path, version = text_source(settings), settings.version
    options = {"precision": settings.text_encoder_precision, "key": TEXT, "length": version.text_length}
    if are_only_shapes() and version.text is not None and (not path.exists() or read_config(path, TEXT) is None):
        return T5TextEncoder.of(version.text, StandInTokenizer(), dict, path, device=device, **options)
    encoder = T5TextEncoder.load(path, device=device, **options)
    if encoder.width != (wanted := version.network["caption_channels"]):
        raise WeightsError(f"{TEXT}: states of {path} are {encoder.width} wide, and the network reads {wanted}: name "
                           "the text encoder that it was trained with")  # fmt: skip
    return encoder


def text_files(settings: OpenSoraSettings) -> list[Path]:
    """What cached texts depend on: the text encoder's weights, and its config."""
    place = text_source(settings)
    return [file for file in (place, place / CONFIG) if file == place or file.is_file()]
