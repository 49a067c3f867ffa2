"""Tensors of the networks of a pipeline in the names of single files, and in those of diffusers and transformers.

Single files have the names of the programs that the models were published with: CompVis' stable-diffusion and
Stability-AI's generative-models, and open_clip for SDXL's second text encoder. A component is called as in diffusers'
folders: `unet`, `vae`, `text_encoder`, `text_encoder_2`. Names are without the prefix of their component. What differs
beside names:

    vae               weights of attention are 1 x 1 convolutions (C, C, 1, 1), and linear layers (C, C) in diffusers
    text_encoder_2    query, key and value are one matrix (3 D, D), and `text_projection` is transposed

A file is read tensor by tensor, so that it is never held as a whole.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import Tensor

from families.common.original_unet import library_unet_name, original_unet_name
from modules.clip_weights import LAYERS, OUTSIDE, convert_hugging_face

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT_MODEL = "text_model."
"""What the names of CLIP's layers begin with in files; transformers 5 dropped it from CLIPTextModel's own names."""
NOT_READ = re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale")
"""Tensors of text encoders that say nothing about what they compute."""

_VAE_LAYERS = {
    "block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0", "downsample": "downsamplers.0",
    "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP = {original: own for own, original in OUTSIDE.items() if own.startswith("text_")}
_OPEN_CLIP_LAYERS = {original: own for own, original in LAYERS.items()}


# ---------------------------------------------------------------- from single files


def library_tensors(
    component: str, names: Collection[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
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
        levels = 1 + max(_numbers(r"decoder\.up\.(\d+)\.", names))
        yield from (_library_vae(name, levels, read(name)) for name in names)
    elif component == "text_encoder":
        yield from ((name.removeprefix(TEXT_MODEL), read(name)) for name in names)
    else:
        yield from (tensor for name in names for tensor in _library_open_clip(name, read(name)))


def layers_per_block(names: Collection[str]) -> int:
    """Residual blocks per level of a U-Net with original names, going down."""
    samplers = _numbers(r"input_blocks\.(\d+)\.0\.op\.", names)
    return (min(samplers) if samplers else len(_numbers(r"input_blocks\.(\d+)\.", names))) - 1


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
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if name in _OPEN_CLIP:
        yield _OPEN_CLIP[name], tensor.T.contiguous() if name == "text_projection" else tensor
    elif block is None:
        raise ValueError(f"{name} is no tensor of open_clip's text encoder")
    elif fused := re.fullmatch(r"attn\.in_proj_(weight|bias)", block[2]):
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"text_model.encoder.layers.{block[1]}.self_attn.{part}_proj.{fused[1]}", rows.clone()
    else:
        yield f"text_model.encoder.layers.{block[1]}.{_renamed(block[2], _OPEN_CLIP_LAYERS)}", tensor


# ---------------------------------------------------------------- to single files


def original_tensors(component: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `library_tensors`; a text encoder's names may have `text_model.` or not.

    Raises:
        ValueError: a tensor that such a network does not have.
    """
    own = {name: tensor for name, tensor in tensors.items() if not NOT_READ.fullmatch(name)}
    if component == "unet":
        per_block = 1 + max(_numbers(r"down_blocks\.\d+\.resnets\.(\d+)\.", own))
        attention = _numbers(r"up_blocks\.(\d+)\.attentions\.", own)
        return {original_unet_name(name, per_block, attention): tensor for name, tensor in own.items()}
    if component == "vae":
        levels = 1 + max(_numbers(r"decoder\.up_blocks\.(\d+)\.", own))
        return dict(_original_vae(name, levels, tensor) for name, tensor in own.items())
    if component == "text_encoder":
        return {TEXT_MODEL + name.removeprefix(TEXT_MODEL): tensor for name, tensor in own.items()}
    return convert_hugging_face(own)


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


def _numbers(pattern: str, names: Iterable[str]) -> set[int]:
    """The numbers in names that begin with a pattern."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _renamed(name: str, table: dict[str, str]) -> str:
    """A layer's or a tensor's name with its layer renamed, where the table has it."""
    layer, dot, parameter = name.rpartition(".")
    return table.get(layer, layer) + dot + parameter
