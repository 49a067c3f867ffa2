"""What `train/train_sd_lora.py` understands."""

from typing import Self

from pydantic import Field, PositiveFloat, model_validator

from families.common.lora_config import LoraKeys, TokenKeys
from families.stable_diffusion.config import SdConfig
from warpcore.config_keys import MAX_ENTRIES


class SdLoraConfig(LoraKeys, TokenKeys, SdConfig):
    """Keys of `train/train_sd_lora.py`."""

    text_encoder_filters: list[str] = Field([], max_length=MAX_ENTRIES)
    """Which layers of the text encoders are adapted, as `module_filters` says it of the U-Net: `self_attn` and `mlp`
    are those that kohya's scripts adapt. None by default."""
    text_encoder_lr: PositiveFloat | None = None
    """Learning rate of the adapters in the text encoders; by default `lr`. One each for SDXL's two: `parameter_groups`
    with the names `text.encoders.0` and `text.encoders.1`."""

    @model_validator(mode="after")
    def _a_base_and_something_to_learn(self) -> Self:
        if self.generator_checkpoint_path is None and not self.is_toy:
            raise ValueError("a LoRA changes a trained network: give generator_checkpoint_path")
        if self.text_model == "t5" and (self.text_encoder_filters or self.train_tokens):
            key = "text_encoder_filters" if self.text_encoder_filters else "train_tokens"
            raise ValueError(f"{key}: with text_model: t5 a LoRA is of the U-Net alone; remove it")
        if self.text_encoder_lr is not None and not self.text_encoder_filters:
            raise ValueError("text_encoder_lr: no text encoder is adapted; give text_encoder_filters, or remove it")
        if self.cache_text and self.text_encoder_filters:
            raise ValueError("cache_text: what captions mean changes with text_encoder_filters; remove one of the two")
        return self
