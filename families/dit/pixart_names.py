"""Tensors of PixArt-alpha in the names of published checkpoints and in those of diffusers; their values are the same.

    blocks.0.attn.qkv.weight                 transformer_blocks.0.attn1.to_q, to_k, to_v.weight, one below the other
    blocks.0.cross_attn.kv_linear.weight     transformer_blocks.0.attn2.to_k, to_v.weight
    y_embedder.y_embedding                   y_embedding: of our class alone

Published files also hold `pos_embed`, which follows from the sizes.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

POSITIONS = ("pos_embed", "pos_embed_temporal")
EMPTY, LIBRARY_EMPTY = "y_embedder.y_embedding", "y_embedding"
TABLE = "scale_shift_table"
_OUTSIDE = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
"""Published names of layers -> those of diffusers, of which several are parts of equal size."""


def library_layers(name: str) -> tuple[str, ...] | None:
    """diffusers' names of a layer with a published name; None where the network has no such layer."""
    block = re.fullmatch(r"blocks\.(\d{1,9})\.(.+)", name)
    if block is None:
        return _OUTSIDE.get(name)
    parts = _IN_BLOCK.get(block[2])
    return parts and tuple(f"transformer_blocks.{block[1]}.{part}" for part in parts)


def library_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with published names in those of diffusers, without tables of positions.

    A name that the network does not have stays as it is: whoever loads the weights strictly will say so.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        if name in POSITIONS:
            continue
        if parameter == TABLE:
            found[TABLE if layer == "final_layer" else f"transformer_{name}"] = tensor
        elif name == EMPTY:
            found[LIBRARY_EMPTY] = tensor
        elif (layers := library_layers(layer)) is None or not tensor.dim():
            found[name] = tensor
        else:
            if layer == "x_embedder.proj" and tensor.dim() == 5 and tensor.shape[2] == 1:  # Open-Sora's: of a frame
                tensor = tensor[:, :, 0]
            parts = tensor.tensor_split(len(layers))
            found |= {f"{own}.{parameter}": part for own, part in zip(layers, parts, strict=True)}
    return found


def published_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `library_tensors`, without tables of positions.

    Raises:
        ValueError: a tensor that the network does not have, or a part that is missing.
    """
    found, left = {}, dict(tensors)
    blocks = {match[1] for name in left if (match := re.match(r"transformer_blocks\.(\d{1,9})\.", name))}
    layers = [*_OUTSIDE, *(f"blocks.{block}.{layer}" for block in sorted(blocks, key=int) for layer in _IN_BLOCK)]
    tables = {TABLE: f"final_layer.{TABLE}", LIBRARY_EMPTY: EMPTY}
    tables |= {f"transformer_blocks.{block}.{TABLE}": f"blocks.{block}.{TABLE}" for block in blocks}
    found |= {own: left.pop(library) for library, own in tables.items() if library in left}
    for layer in layers:
        for parameter in ("weight", "bias"):
            names = [f"{own}.{parameter}" for own in library_layers(layer)]
            if all(name in left for name in names):
                parts = [left.pop(name) for name in names]
                found[f"{layer}.{parameter}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if left:
        raise ValueError(f"{next(iter(left))} is no tensor of this network")
    return found
