"""Small networks of Open-Sora for tests."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from families.common.wan_training import TrainedWanAutoencoder, from_scratch


def write_wan(path: Path) -> Path:
    """A small AutoencoderKLWan with random weights, in place of the one that ships: 8 px per position, 16 channels."""
    torch.manual_seed(0)
    autoencoder = TrainedWanAutoencoder(from_scratch(8, [1, 1, 2], 1, 16, 2))
    tensors = {name: tensor.contiguous() for name, tensor in autoencoder.model.state_dict().items()}
    save_file(tensors, path, autoencoder.metadata_to_save())
    return path
