"""Tensors of the denoiser in the names of published checkpoints and in those of diffusers; their values are the same.

    net.blocks.0.self_attn.q_proj.weight      transformer_blocks.0.attn1.to_q.weight
    net.x_embedder.proj.1.weight              patch_embed.proj.weight

Published files also hold buffers, which diffusers computes, and numbers that count the training.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX, AVERAGE = "net.", "net_ema."
"""What published names begin with: of the weights, and of their average."""
BLOCKS, LIBRARY_BLOCKS = "blocks", "transformer_blocks"

_OUTSIDE = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_ATTENTION = {
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
    "k_norm": "norm_k",
}  # fmt: skip
_IN_BLOCK = {
    **{
        f"adaln_modulation_{part}.{number}": f"norm{place}.linear_{number}"
        for place, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
    **{f"self_attn.{own}": f"attn1.{library}" for own, library in _ATTENTION.items()},
    **{f"cross_attn.{own}": f"attn2.{library}" for own, library in _ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}
_NOT_WEIGHTS = re.compile(r"accum_\w+|pos_embedder\.\w+|(.+\.)?_extra_state")
"""Buffers and counters; `_extra_state` is of Transformer Engine."""
_LONGEST_SIDE, _FRAMES, _PATCH = 240, 128, 2
"""The largest latents, in positions and frames, and the patch: what the published buffers are made for."""


def library_layer(name: str) -> str | None:
    """diffusers' name of a layer with a published name, without prefix; None where the network has no such layer."""
    block = re.fullmatch(rf"{BLOCKS}\.(\d+)\.(.+)", name)
    if block is None:
        return _OUTSIDE.get(name)
    inside = _IN_BLOCK.get(block[2])
    return inside and f"{LIBRARY_BLOCKS}.{block[1]}.{inside}"


def published_layer(name: str) -> str | None:
    """The inverse of `library_layer`."""
    block = re.fullmatch(rf"{LIBRARY_BLOCKS}\.(\d+)\.(.+)", name)
    if block is None:
        return _OUTSIDE_BACK.get(name)
    inside = _IN_BLOCK_BACK.get(block[2])
    return inside and f"{BLOCKS}.{block[1]}.{inside}"


_OUTSIDE_BACK = {library: own for own, library in _OUTSIDE.items()}
_IN_BLOCK_BACK = {library: own for own, library in _IN_BLOCK.items()}


def is_published(name: str) -> bool:
    """Whether a tensor has a published name, with or without prefix."""
    layer = bare(name).rpartition(".")[0]
    return library_layer(layer) is not None or library_layer(layer.removesuffix(".base_layer")) is not None


def bare(name: str) -> str:
    """A published name without its prefix."""
    return re.sub(r"^net(_ema)?\.", "", name)


def library_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with published names, without prefix, in the names of diffusers; buffers and counters are left out.

    A name that the network does not have stays as it is: whoever loads the weights strictly will say so.
    """
    found = {}
    for name, tensor in tensors.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        layer, _, parameter = name.rpartition(".")
        library = library_layer(layer)
        found[f"{library}.{parameter}" if library else name] = tensor
    return found


def published_tensors(tensors: Mapping[str, Tensor], head_size: int) -> dict[str, Tensor]:
    """Weights with diffusers' names as a published file holds them, without prefix, with its buffers.

    The published programs load on the meta device, so that a buffer which is missing in the file would have no values.

    head_size: numbers per attention head, which the buffers depend on.

    Raises:
        ValueError: a tensor that the network does not have.
    """
    found = buffers(head_size)
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        own = published_layer(layer)
        if own is None:
            raise ValueError(f"{name} is no tensor of this network")
        found[f"{own}.{parameter}"] = tensor
    return found


def buffers(head_size: int) -> dict[str, Tensor]:
    """What a published file holds beside its weights: counters, and the numbers that rotary angles are made of."""
    spatial = head_size // 6 * 2
    temporal = head_size - 2 * spatial
    counters = ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration")
    return {name: torch.zeros((), dtype=torch.int64) for name in counters} | {
        "accum_train_in_hours": torch.zeros(()),
        "pos_embedder.seq": torch.arange(max(_LONGEST_SIDE // _PATCH, _FRAMES), dtype=torch.float32),
        "pos_embedder.dim_spatial_range": torch.arange(0, spatial, 2)[: spatial // 2].float() / spatial,
        "pos_embedder.dim_temporal_range": torch.arange(0, temporal, 2)[: temporal // 2].float() / temporal,
    }
