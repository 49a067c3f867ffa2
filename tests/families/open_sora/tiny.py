"""Small networks of Open-Sora for tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from families.common.library_files import CONFIG_KEY
from families.common.wan_training import TrainedWanAutoencoder, from_scratch
from families.common.weight_files import FAMILY_KEY
from families.open_sora.versions import VERSIONS
from modules.open_sora_vae import OpenSoraAutoencoder, TemporalAutoencoder
from modules.stdit3 import STDiT3


def write_wan(path: Path) -> Path:
    """A small AutoencoderKLWan with random weights, in place of the one that ships: 8 px per position, 16 channels."""
    torch.manual_seed(0)
    autoencoder = TrainedWanAutoencoder(from_scratch(8, [1, 1, 2], 1, 16, 2))
    tensors = {name: tensor.contiguous() for name, tensor in autoencoder.model.state_dict().items()}
    save_file(tensors, path, autoencoder.metadata_to_save())
    return path


SPATIAL = {
    "block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TEMPORAL = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
"""Numbers of a small autoencoder of Open-Sora 1.2."""
SMALL = {
    "input_sq_size": 64, "in_channels": 4, "patch_size": [1, 2, 2], "pred_sigma": True, "caption_channels": 64,
    "model_max_length": 32, "qk_norm": True, "hidden_size": 32, "num_heads": 2, "depth": 1,
}  # fmt: skip
"""Numbers of a small STDiT3 of its latents, and of the mini T5."""


def write_autoencoder(path: Path) -> Path:
    """A small autoencoder of Open-Sora 1.2 with random weights, in a file that says its numbers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = OpenSoraAutoencoder(AutoencoderKL(**SPATIAL), TemporalAutoencoder(**TEMPORAL))
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, {CONFIG_KEY: json.dumps({"spatial": SPATIAL, "temporal": TEMPORAL})})
    return path


def random_network(**changes) -> STDiT3:
    """A small STDiT3 in which every layer does something."""
    torch.manual_seed(0)
    network = STDiT3(**(SMALL | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def write_mini(path: Path) -> Path:
    """The mini STDiT3 with random weights, in which every layer does something."""
    save_file(random_network(**VERSIONS["mini"].network).state_dict(), path, {FAMILY_KEY: "open_sora"})
    return path


def small_settings(folder: Path, data: Path | str, **changes) -> dict:
    return {
        "experiment_id": "run", "checkpoint_path": str(folder / "runs"), "webdataset_path": str(data), "device": "cpu",
        "model_version": "mini", "text_encoder_precision": "float32", "num_frames": 9, "image_size": 32,
        "batch_size": 4, "updates": 1, "save_every": 1, "log_every": 1, "num_workers": 0, "lr": 0.01,
        "sample_steps": 1, "sample_count": 2, "crop_mode": "center",
    } | changes  # fmt: skip
