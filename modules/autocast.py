"""Arithmetic that a run's autocast must leave alone."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, autocast does not apply; on a device that has none (meta), there is nothing to switch off."""
    there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if there else nullcontext()
