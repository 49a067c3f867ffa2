"""Build a DiT or a Latte with its weights, and its diffusion process."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from families.common.library_files import construct
from families.common.weight_files import GENERATOR
from families.common.weights import WeightsError, check_names
from families.dit.autoencoder import latents_of
from families.dit.config import DitSettings
from families.dit.files import read_dit
from families.dit.versions import version_of
from modules.dit import POSITIONS, DiT, frame_positions, grid_positions
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.processes import discrete_process
from warpcore.loading import assign
from warpcore.meta import are_only_shapes


def dit(settings: DitSettings, size_px: Sequence[int], dtype: torch.dtype = torch.float32) -> DiT:
    """The denoiser, with positions for pictures of `size_px` (H, W); random weights where the settings name no file.

    Raises:
        WeightsError: the file is missing, damaged, or of another network than the settings say.
    """
    path, config = settings.generator_checkpoint_path, network_numbers(settings, size_px)
    if are_only_shapes() or path is None:
        with torch.device("meta" if are_only_shapes() else "cpu"):
            return construct(DiT, config, GENERATOR).to(dtype)
    found = read_dit(path, GENERATOR)
    check_network(found.config, settings)
    with torch.device("meta"):
        network = construct(DiT, config, GENERATOR)
    state = found.tensors | positions(network)
    check_names(network.state_dict(), state, path, GENERATOR)
    assign(network, state, dtype, deferrable=True)
    return network


def positions(network: DiT) -> dict[str, Tensor]:
    """The tables of positions of a network, which files need not have."""
    tables = {POSITIONS[0]: grid_positions(network.grid, network.hidden_size)}
    if network.num_frames is not None:
        tables[POSITIONS[1]] = frame_positions(network.num_frames, network.hidden_size)
    return tables


def network_numbers(settings: DitSettings, size_px: Sequence[int]) -> Mapping[str, Any]:
    """The constructor numbers of the denoiser for pictures, or frames, of `size_px` (H, W)."""
    compression = latents_of(settings)[1]
    size = [side // compression for side in size_px]
    own = {"num_classes": settings.num_classes, "learn_sigma": settings.learn_sigma}
    own |= {} if settings.clip_frames is None else {"num_frames": settings.clip_frames}
    return dict(settings.version.network) | own | {"input_size": size[0] if size[0] == size[1] else size}


def check_network(config: Mapping[str, Any], settings: DitSettings) -> None:
    """Raise WeightsError where the network of a file is another one than the settings say, and say what to write."""
    path, version = settings.generator_checkpoint_path, version_of(config)
    of_clips = config.get("num_frames") is not None
    if of_clips != (settings.clip_frames is not None):
        held, name = ("a Latte, which draws clips", "latte") if of_clips else ("a DiT, of pictures", "dit")
        raise WeightsError(f"{GENERATOR}: {path} is {held}: train/train_{name}.py trains it; name other weights")
    if version is not None and version != settings.model_version:
        raise WeightsError(f"{GENERATOR}: {path} is a DiT-{version}; write model_version: {version}")
    for name in ("num_classes", "learn_sigma"):
        here, there = getattr(settings, name), config.get(name, DEFAULTS[name])
        if here != there:
            written = str(there).lower()
            raise WeightsError(f"{GENERATOR}: {path} has {name}: {written}, and the config {str(here).lower()}; write "
                               f"{name}: {written}")  # fmt: skip


DEFAULTS = {"num_classes": 1000, "learn_sigma": True}
"""Of the constructor."""


def process(settings: DitSettings, loss_weight: str = "constant", offset_noise: float = 0.0) -> GDF:
    """1,000 timesteps with linear betas from 1e-4 to 0.02 (arXiv:2006.11239, section 4)."""
    return discrete_process(
        "linear", settings.diffusion_target or "epsilon", loss_weight, offset_noise=offset_noise,
        learned_variance=settings.learn_sigma,
    )  # fmt: skip
