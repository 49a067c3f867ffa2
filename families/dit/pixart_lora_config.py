"""What `train/train_pixart_lora.py` understands."""

from pydantic import Field

from families.common.lora_config import TransformerLoraKeys
from families.common.techniques.config import TECHNIQUES
from families.dit.pixart_config import PixartConfig
from warpcore.config_keys import MAX_ENTRIES


class PixartLoraConfig(TransformerLoraKeys, PixartConfig):
    """Keys of `train/train_pixart_lora.py`.

    Its network is trained already, so that techniques for training from scratch have no use.
    """

    unused = TECHNIQUES

    module_filters: list[str] = Field(["attn"], max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, or regular expressions on them; `.` is all. By default the
    projections of both attentions."""
