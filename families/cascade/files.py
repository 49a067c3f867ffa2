"""What the cascade's weights files are called, and how they are told from those of other families."""

import re

from families.cascade.versions import VERSIONS
from families.common.weight_files import Header

WEIGHT_KEYS = {
    "generator": "generator_checkpoint_path",
    "lora": "lora",
    "controlnet": "controlnet",
    "stage_a": "stage_a_checkpoint_path",
    "encoder": "effnet_checkpoint_path",
    "effnet_encoder": "effnet_checkpoint_path",
    "previewer": "previewer_checkpoint_path",
    "text_tower": "clip_text_model_name",
    "image_tower": "clip_image_model_name",
}
"""The key of inference scripts that takes the weights a run exports under this name; `generator` is Stage B's or Stage
C's."""
STEERING = ("lora", "controlnet")
"""Weights that steer a frozen Stage C. The keys that take lists of them have the same names."""
STAGE_B_TENSOR = "effnet_mapper.0.weight"
"""A tensor that Stage B has, and Stage C has not."""

_OWN_TENSORS = (
    {"clip_txt_mapper.weight", "clip_txt_pooled_mapper.weight"},  # Stage C
    {STAGE_B_TENSOR, "pixels_mapper.0.weight"},  # Stage B
    {"in_block.1.weight", "down_blocks.0.gammas"},  # Stage A
    {"mapper.0.weight", "backbone.0.0.weight"},  # encoder
    {"blocks.24.weight", "blocks.23.running_var"},  # previewer
    {"projections.0.0.weight", "projections.0.2.weight"},  # ControlNet
)
_LORA = re.compile(
    r"(base_model\.model\.)?(prior\.|unet\.|diffusion_model\.|lora_prior_unet[._]|lora_unet_|lycoris_)?"
    r"((down|up)_blocks[._]\d+[._]\d+[._]|clip_(txt|img)_).*lora|weights\.0\.lora_down"
)
"""Names in LoRA files of all programs; the last is the reference implementation's."""
_TOWER_SETTINGS = "clip_settings"


def is_of_cascade(header: Header) -> bool:
    """Whether weights are the cascade's: runs write its `model_version` or the settings of a tower into them,
    published ones have tensors that no other network has."""
    about = header.metadata
    return (
        about.get("model_version") in VERSIONS
        or _TOWER_SETTINGS in about
        or any(own <= header.names for own in _OWN_TENSORS)
        or any(map(_LORA.match, header.names))
    )
