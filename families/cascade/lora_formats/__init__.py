"""LoRA files of Stable Cascade in the layouts of other programs; what any family has is in `families.common`."""

from families.cascade.lora_formats.reference import to_reference
from families.common.lora_formats import Adapter, Lora, LoraFileError, metadata, split, to_tensors

__all__ = ["Adapter", "Lora", "LoraFileError", "metadata", "split", "to_reference", "to_tensors"]
