"""Tensors of the networks of a pipeline in the names of single files, and in those of diffusers and transformers.

Single files have the names of the programs that the models were published with: CompVis' stable-diffusion and
Stability-AI's generative-models, and open_clip for SDXL's second text encoder. A component is called as in diffusers'
folders: `unet`, `vae`, `text_encoder`, `text_encoder_2`. Names are without the prefix of their component. What differs
beside names:

    vae               weights of attention are 1 x 1 convolutions (C, C, 1, 1), and linear layers (C, C) in diffusers
    text_encoder_2    query, key and value are one matrix (3 D, D), and `text_projection` is transposed

Functions take a mapping of names and one that reads a tensor, so that a file is never held as a whole.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from families.common.original_unet import library_unet_name, original_unet_name

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT_MODEL = "text_model."
"""What the names of CLIP's layers begin with in files; transformers 5 dropped it from CLIPTextModel's own names."""
NOT_READ = re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale")
"""Tensors of text encoders that say nothing about what they compute."""

Read = Callable[[str], Tensor]

_VAE_LAYERS = {
    "block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0", "downsample": "downsamplers.0",
    "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
_OPEN_CLIP_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_BLOCK = "transformer.resblocks."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


# ---------------------------------------------------------------- from single files


def library_tensors(component: str, names: Collection[str], read: Read) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a component in the names and shapes of diffusers' and transformers' own networks.

    Args:
        names: all of the component in the single file, without its prefix.
        read: gives the tensor of such a name.

    Raises:
        ValueError: no network of this kind has such a tensor.
    """
    names = [name for name in names if not NOT_READ.fullmatch(name)]
    if component == "unet":
        per_block = layers_per_block(names)
        yield from ((library_unet_name(name, per_block), read(name)) for name in names)
    elif component == "vae":
        levels = 1 + max(int(match[1]) for name in names if (match := re.match(r"decoder\.up\.(\d+)\.", name)))
        yield from (_library_vae(name, levels, read(name)) for name in names)
    elif component == "text_encoder":
        yield from ((name.removeprefix(TEXT_MODEL), read(name)) for name in names)
    else:
        yield from (tensor for name in names for tensor in _library_open_clip(name, read(name)))


def layers_per_block(names: Iterable[str]) -> int:
    """Residual blocks per level of a U-Net with original names, going down."""
    blocks = {int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    samplers = {int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))}
    return min(samplers) - 1 if samplers else len(blocks) - 1


def _library_vae(name: str, levels: int, tensor: Tensor) -> tuple[str, Tensor]:
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if match is None:  # quant_conv, post_quant_conv
        return name, tensor
    side, rest = match[1], match[2]
    if level := re.fullmatch(r"(down|up)\.(\d+)\.(?:block\.(\d+)|(\w+sample))\.(.+)", rest):
        number = int(level[2]) if level[1] == "down" else levels - 1 - int(level[2])
        inside = f"resnets.{level[3]}" if level[3] else _VAE_LAYERS[level[4]]
        return f"{side}.{level[1]}_blocks.{number}.{inside}.{_renamed(level[5], _VAE_LAYERS)}", tensor
    if middle := re.fullmatch(r"mid\.(block_1|block_2|attn_1)\.(.+)", rest):
        attention = middle[1] == "attn_1"
        inside = _renamed(middle[2], _VAE_ATTENTION if attention else _VAE_LAYERS)
        matrix = attention and tensor.dim() == 4
        return f"{side}.mid_block.{_VAE_LAYERS[middle[1]]}.{inside}", tensor[:, :, 0, 0] if matrix else tensor
    return f"{side}.{_renamed(rest, _VAE_LAYERS)}", tensor


def _library_open_clip(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name == "text_projection":
        yield "text_projection.weight", tensor.T.contiguous()
    elif name in _OPEN_CLIP:
        yield TEXT_MODEL + _OPEN_CLIP[name], tensor
    elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
        layer = f"{TEXT_MODEL}encoder.layers.{match[1]}"
        if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            parameter = match[2].rpartition("_")[2]
            for part, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                yield f"{layer}.self_attn.{part}.{parameter}", rows.clone()
        else:
            yield f"{layer}.{_renamed(match[2], _OPEN_CLIP_LAYERS)}", tensor
    else:
        raise ValueError(f"{name} is no tensor of open_clip's text encoder")


# ---------------------------------------------------------------- to single files


def original_tensors(component: str, names: Collection[str], read: Read) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `library_tensors`; a text encoder's names may have `text_model.` or not.

    Raises:
        ValueError: a tensor that such a network does not have.
    """
    names = [name for name in names if not NOT_READ.fullmatch(name)]
    if component == "unet":
        per_block = 1 + max(int(match[1]) for name in names if (match := re.match(r"down_.+\.resnets\.(\d+)", name)))
        attention = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        yield from ((original_unet_name(name, per_block, attention), read(name)) for name in names)
    elif component == "vae":
        levels = 1 + max(int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
        yield from (_original_vae(name, levels, read(name)) for name in names)
    elif component == "text_encoder":
        yield from ((TEXT_MODEL + name.removeprefix(TEXT_MODEL), read(name)) for name in names)
    else:
        yield from _original_open_clip(names, read)


def _original_vae(name: str, levels: int, tensor: Tensor) -> tuple[str, Tensor]:
    layers = {own: original for original, own in _VAE_LAYERS.items()}
    attention = {own: original for original, own in _VAE_ATTENTION.items()}
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if match is None:
        return name, tensor
    side, rest = match[1], match[2]
    if level := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(\w+samplers\.0))\.(.+)", rest):
        number = int(level[2]) if level[1] == "down" else levels - 1 - int(level[2])
        inside = f"block.{level[3]}" if level[3] else layers[level[4]]
        return f"{side}.{level[1]}.{number}.{inside}.{_renamed(level[5], layers)}", tensor
    if middle := re.fullmatch(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)", rest):
        attends = middle[1] == "attentions.0"
        inside = _renamed(middle[2], attention if attends else layers)
        matrix = attends and tensor.dim() == 2
        return f"{side}.mid.{layers[middle[1]]}.{inside}", tensor[:, :, None, None] if matrix else tensor
    return f"{side}.{_renamed(rest, layers)}", tensor


def _original_open_clip(names: Collection[str], read: Read) -> Iterator[tuple[str, Tensor]]:
    outside = {own: original for original, own in _OPEN_CLIP.items()}
    layers = {own: original for original, own in _OPEN_CLIP_LAYERS.items()}
    for name in names:
        bare = name.removeprefix(TEXT_MODEL)
        if bare == "text_projection.weight":
            yield "text_projection", read(name).T.contiguous()
        elif bare in outside:
            yield outside[bare], read(name)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", bare):
            rows = [read(name.replace("q_proj", part)) for part in _PROJECTIONS]
            yield f"{_BLOCK}{match[1]}.attn.in_proj_{match[2]}", torch.cat(rows)
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(?!self_attn\.[kv]_proj\.)(.+)", bare):
            yield f"{_BLOCK}{match[1]}.{_renamed(match[2], layers)}", read(name)
        elif not bare.startswith("encoder.layers."):
            raise ValueError(f"{name} is no tensor of SDXL's second text encoder")


def _renamed(name: str, table: dict[str, str]) -> str:
    """A layer's or a tensor's name with its layer renamed, where the table has it."""
    layer, dot, parameter = name.rpartition(".")
    return table.get(layer, layer) + dot + parameter
