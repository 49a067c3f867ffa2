"""What `train/train_cosmos_lora.py` understands."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from families.common.lora_config import LoraKeys
from families.common.techniques.config import TECHNIQUES
from families.cosmos.config import CosmosConfig
from warpcore.config_keys import MAX_ENTRIES


class CosmosLoraConfig(LoraKeys, CosmosConfig):
    """Keys of `train/train_cosmos_lora.py`."""

    unused = TECHNIQUES
    module_filters: list[str] = Field([".to_", ".ff."], max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, or regular expressions on them; `.` is all. By default those
    that the published program adapts: the projections of both attentions, and the feed-forward layers."""
    rank: PositiveInt = 16
    """How much an adapter can hold: it is two matrices, one with this many columns, one with this many rows."""

    @model_validator(mode="after")
    def _a_base(self) -> Self:
        if self.generator_checkpoint_path is None and self.model_version != "mini":
            raise ValueError("a LoRA changes a trained network: give generator_checkpoint_path")
        return self
