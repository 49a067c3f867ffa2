"""Caches of other trainers of Stable Diffusion: what a safetensors file beside a picture holds."""

from collections.abc import Mapping

import torch
from torch import Tensor

LATENT, EMBEDDING = "latent", "emb"
"""The mean (C, H, W) of an autoencoder's posterior, not scaled; states (L, D) of a text encoder."""
NO_VARIANCE = -30.0
"""The least log variance that moments have: a latent drawn with it is the mean, to 3e-7."""


def features_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`moments` (2 C, H, W) of a latent, `text` (L, D) of an embedding; float32.

    Raises:
        ValueError: it holds something else.
    """
    shapes = {name: (tensor.dim(), tensor.is_floating_point()) for name, tensor in tensors.items()}
    if shapes == {LATENT: (3, True)}:
        mean = tensors[LATENT].float()
        return {"moments": torch.cat([mean, torch.full_like(mean, NO_VARIANCE)])}
    if shapes == {EMBEDDING: (2, True)}:
        return {"text": tensors[EMBEDDING].float()}
    found = ", ".join(f"{name[:40]!r} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
    raise ValueError(f"holds {found or 'nothing'}, not {LATENT!r} (C, H, W) or {EMBEDDING!r} (L, D)")
