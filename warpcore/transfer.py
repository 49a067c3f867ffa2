"""Copies to a GPU that Python need not wait for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`.

    From the CPU to a GPU it travels from page-locked memory, in the order of the GPU's work: a plain copy would wait
    until the GPU has done all that it was given before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
