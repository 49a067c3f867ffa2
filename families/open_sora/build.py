"""Build the networks of Open-Sora with their weights, and its diffusion process."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.caption_cleaning import clean_caption
from families.common.library_files import CONFIG, component_folder, construct, read_config
from families.common.random_start import random_start
from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.weight_files import GENERATOR, TEXT
from families.common.weight_source import local_weights
from families.common.weights import WeightsError, check_names
from families.open_sora.config import OpenSoraSettings
from families.open_sora.files import positions_in, read_network
from families.open_sora.versions import FLOW
from modules.stdit import POSITIONS, STDiT
from modules.stdit_parts import ClipTransformer
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.schedules import shift_by_size
from warpcore.loading import assign
from warpcore.meta import are_only_shapes

logger = logging.getLogger(__name__)

TIMESTEPS = 1000
"""What the network is told of pure noise."""


def network(settings: OpenSoraSettings, dtype: torch.dtype = torch.float32) -> ClipTransformer:
    """The denoiser; random weights where the settings name no file.

    Raises:
        WeightsError: the file is missing, damaged, or of another network than the settings say.
    """
    path, kind = settings.generator_checkpoint_path, settings.version.kind
    build = partial(construct, kind, network_numbers(settings), GENERATOR)
    if path is None and not are_only_shapes():
        return random_start(build, kind.initialise_layer, dtype).to(dtype)
    with torch.device("meta"):
        made = build()
    if not are_only_shapes():
        tensors = read_network(path, GENERATOR, settings.model_version)
        if kind is STDiT:
            tensors = with_positions(tensors, made, path)
        check_names(made.state_dict(), tensors, path, GENERATOR)
        assign(made, tensors, dtype, deferrable=True)
    return made.to(dtype)


def network_numbers(settings: OpenSoraSettings) -> dict[str, Any]:
    """The constructor numbers of the denoiser."""
    version = settings.version
    scales = {name: getattr(settings, name) for name in ("space_scale", "time_scale")}
    return dict(version.network) | (scales if version.kind is STDiT else {})


def with_positions(tensors: dict[str, Tensor], network: STDiT, path: Path) -> dict[str, Tensor]:
    """Tensors of a file with the tables of positions of a network, as the published program computes them.

    That a file was made with other scales is logged: a training on clips of another size may want that.
    """
    tables = network.positions(network.grid, torch.device("cpu"))
    for name, found, own in zip(("space_scale", "time_scale"), positions_in(tensors), tables, strict=False):
        if found.shape == own[0, 1].shape and (found - own[0, 1]).abs().max() > 1e-3:
            logger.warning("%s has positions of another %s than %s: write that of its training, or go on with other "
                           "ones", path, name, getattr(network, name))  # fmt: skip
    return tensors | dict(zip(POSITIONS, tables, strict=True))


def process(settings: OpenSoraSettings, loss_weight: str = "constant", offset_noise: float = 0.0) -> GDF:
    """1.2: the straight flow; the network is told 1,000 times the share of the noise, and predicts the way from it.
    1.0 and 1.1: 1,000 timesteps with linear betas (arXiv:2006.11239, section 4), and a learned variance of steps."""
    if settings.version.target != FLOW:
        return discrete_process("linear", loss_weight=loss_weight, offset_noise=offset_noise, learned_variance=True)
    keys = {"logit_mean": getattr(settings, "logit_mean", 0.0), "logit_std": getattr(settings, "logit_std", 1.0)}
    logit_normal = getattr(settings, "timestep_sampling", "logit_normal") == "logit_normal"
    return flow_process(loss_weight, steps=TIMESTEPS, logit_normal=logit_normal, **keys, signalwards=True,
                        offset_noise=offset_noise)  # fmt: skip


def time_shift(settings: OpenSoraSettings, height: Tensor, width: Tensor, latent_frames: int) -> float | Tensor:
    """The shift (B,) of the times of clips, by their size (B,) in pixels and the frames of their latents; 1 for all
    where there is none."""
    if not settings.use_timestep_transform or settings.version.target != FLOW:
        return 1.0
    return shift_by_size(height, width, torch.full_like(height, latent_frames))


def drawing_shift(settings: OpenSoraSettings, size_px: Sequence[int], latent_frames: int) -> float:
    """The same of clips to draw, of `size_px` (T, H, W)."""
    height, width = (torch.tensor([side]) for side in size_px[1:])
    return float(time_shift(settings, height, width, latent_frames))


def text_source(settings: OpenSoraSettings) -> Path:
    """The file or folder of the text encoder; what is only on the hub is downloaded, but for shapes alone."""
    given = settings.text_encoder_checkpoint_path or Path(settings.version.text_encoder)
    return component_folder(given if are_only_shapes() else local_weights(given, TEXT), "text_encoder")


def text_encoder(settings: OpenSoraSettings, device: torch.device | str = "cpu", clean: bool = False) -> T5TextEncoder:
    """The text encoder, in its own precision; states behind the end of a text are zeros, which masks hide.

    clean: texts are cleaned before they are read.
    """
    path, version = text_source(settings), settings.version
    options = {"precision": settings.text_encoder_precision, "key": TEXT, "length": version.text_length,
               "clean": clean_caption if clean else str}  # fmt: skip
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
