"""What `train/train_c_lora.py` understands."""

from families.cascade.config import StageCConfig
from families.common.lora_config import LoraKeys, TokenKeys


class LoraConfig(LoraKeys, TokenKeys, StageCConfig):
    """Keys of `train/train_c_lora.py`."""
