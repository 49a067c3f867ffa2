"""What `train/train_stdit_lora.py` understands."""

from typing import Self

from pydantic import Field, model_validator

from families.common.lora_config import TransformerLoraKeys
from families.open_sora.config import OpenSoraConfig
from warpcore.config_keys import MAX_ENTRIES


class OpenSoraLoraConfig(TransformerLoraKeys, OpenSoraConfig):
    """Keys of `train/train_stdit_lora.py`."""

    module_filters: list[str] = Field(["attn"], max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, or regular expressions on them; `.` is all. By default the
    projections of all attentions; `temporal_blocks` are those over time, and `attn_temp` in Open-Sora 1.0 and 1.1."""

    @model_validator(mode="after")
    def _parts_are_not_dropped_alike(self) -> Self:
        if self.lora_dropout and self.sequence_shards > 1:
            raise ValueError(
                "lora_dropout: with sequence_shards it would drop the same in the parts of all processes; remove one"
            )
        return self
