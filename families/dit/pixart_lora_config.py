"""What `train/train_pixart_lora.py` understands."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from families.common.lora_config import LoraKeys
from families.common.techniques.config import TECHNIQUES
from families.dit.pixart_config import PixartConfig
from warpcore.config_keys import MAX_ENTRIES


class PixartLoraConfig(LoraKeys, PixartConfig):
    """Keys of `train/train_pixart_lora.py`."""

    unused = TECHNIQUES
    module_filters: list[str] = Field(["attn"], max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, or regular expressions on them; `.` is all. By default the
    projections of both attentions."""
    rank: PositiveInt = 16
    """How much an adapter can hold: it is two matrices, one with this many columns, one with this many rows."""

    @model_validator(mode="after")
    def _a_base(self) -> Self:
        if self.generator_checkpoint_path is None and self.model_version != "mini":
            raise ValueError("a LoRA changes a trained network: give generator_checkpoint_path")
        return self
