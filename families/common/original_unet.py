"""Names of Stable Diffusion's U-Net in single files (`model.diffusion_model.`), of layers and tensors of diffusers'.

The original counts `input_blocks` and `output_blocks` through all levels; a level of diffusers has `layers_per_block`
pairs of a residual block and a transformer going down and one more going up. Both of SD 1.5 and SDXL follow the rule.
"""

import re

_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""Layers outside of the levels."""
_RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
"""Layers of a residual block."""
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_FROM_OUTSIDE, _FROM_RESIDUAL, _FROM_MIDDLE = (
    {original: own for own, original in table.items()} for table in (_OUTSIDE, _RESIDUAL, _MIDDLE)
)


def original_unet_name(name: str, layers_per_block: int, levels_with_attention: set[int] = frozenset()) -> str:
    """The original name of a layer or a tensor: `down_blocks.1.resnets.0.conv1` -> `input_blocks.4.0.in_layers.2`.

    Args:
        name: of diffusers' UNet2DConditionModel.
        levels_with_attention: numbers of the `up_blocks` that have transformers: their upsampler has another number.

    Raises:
        ValueError: no layer of such a network has this name.
    """
    for own, original in _OUTSIDE.items():
        if name == own or name.startswith(f"{own}."):
            return original + name.removeprefix(own)
    if match := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", name):
        return f"middle_block.{_MIDDLE[match[1]]}.{_inside(match[1], match[2])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} is no layer of Stable Diffusion's U-Net")
    way, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    per_level = layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{(level + 1) * per_level - 1}.{2 if level in levels_with_attention else 1}.{rest}"
    block = f"input_blocks.{1 + level * per_level + number}" if way == "down" else (
        f"output_blocks.{level * per_level + number}"
    )  # fmt: skip
    return f"{block}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def library_unet_name(original: str, layers_per_block: int) -> str:
    """The inverse of `original_unet_name`: `input_blocks.4.0.in_layers.2` -> `down_blocks.1.resnets.0.conv1`.

    Raises:
        ValueError: no layer of such a network has this name.
    """
    for outside, own in _FROM_OUTSIDE.items():
        if original == outside or original.startswith(f"{outside}."):
            return own + original.removeprefix(outside)
    match = re.fullmatch(r"(middle_block|(?:input|output)_blocks\.(\d+))\.(\d)\.(.+)", original)
    if match is None:
        raise ValueError(f"{original} is no layer of Stable Diffusion's U-Net")
    block, number, part, rest = match[1], int(match[2] or 0), match[3], match[4]
    kind = {"0": "resnets", "1": "attentions"}.get(part)
    if block == "middle_block":
        kind = _FROM_MIDDLE[part]
        return f"mid_block.{kind}.{_from_inside(kind, rest)}"
    if block.startswith("input"):
        level, number = divmod(number - 1, layers_per_block + 1)
        if rest.startswith("op."):
            return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        return f"down_blocks.{level}.{kind}.{number}.{_from_inside(kind, rest)}"
    level, number = divmod(number, layers_per_block + 1)
    if rest.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    return f"up_blocks.{level}.{kind}.{number}.{_from_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind.startswith("attentions"):
        return rest
    layer, dot, parameter = rest.partition(".")
    return _RESIDUAL[layer] + dot + parameter


def _from_inside(kind: str, rest: str) -> str:
    if kind.startswith("attentions"):
        return rest
    layer, parameter = re.fullmatch(r"(\w+(?:\.\d+)?)(.*)", rest).groups()
    if layer not in _FROM_RESIDUAL:
        raise ValueError(f"{rest} is no layer of a residual block")
    return _FROM_RESIDUAL[layer] + parameter
