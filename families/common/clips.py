"""Clips through an autoencoder of pictures: each frame by itself, some at a time, so that memory is bounded."""

import torch
from torch import Tensor

from families.common.autoencoders import Autoencoder


def clip_moments(autoencoder: Autoencoder, clips: Tensor, at_once: int) -> Tensor:
    """Moments (B, 2 C, T, h, w) float32 of clips (B, T, 3, H, W) uint8, see `Autoencoder.moments`.

    at_once: frames that are encoded together.
    """
    made = torch.cat([autoencoder.moments(frames) for frames in clips.flatten(0, 1).split(at_once)])
    return made.unflatten(0, clips.shape[:2]).transpose(1, 2)


def decoded_clips(autoencoder: Autoencoder, latents: Tensor, at_once: int) -> Tensor:
    """Clips (B, T, 3, H, W) float32 in [0, 1] of scaled latents (B, C, T, h, w).

    at_once: frames that are decoded together.
    """
    frames = latents.transpose(1, 2).flatten(0, 1)
    made = torch.cat([autoencoder.decode(some) for some in frames.split(at_once)])
    return made.unflatten(0, (len(latents), -1))
