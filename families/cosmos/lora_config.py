"""What `train/train_cosmos_lora.py` understands."""

from pydantic import Field

from families.common.lora_config import TransformerLoraKeys
from families.common.techniques.config import TECHNIQUES
from families.cosmos.config import CosmosConfig
from warpcore.config_keys import MAX_ENTRIES


class CosmosLoraConfig(TransformerLoraKeys, CosmosConfig):
    """Keys of `train/train_cosmos_lora.py`.

    Its network is trained already, so that techniques for training from scratch have no use.
    """

    unused = TECHNIQUES

    module_filters: list[str] = Field([".to_", ".ff."], max_length=MAX_ENTRIES)
    """Which layers are adapted: parts of their names, or regular expressions on them; `.` is all. By default those
    that the published program adapts: the projections of both attentions, and the feed-forward layers."""
