"""What a LoRA file holds, in our names and in those of other programs: a module for each layout, both ways."""

from families.cascade.lora_formats.adapters import Adapter, Lora, LoraFileError, split
from families.cascade.lora_formats.ours import metadata, to_tensors
from families.cascade.lora_formats.reference import to_reference

__all__ = ["Adapter", "Lora", "LoraFileError", "metadata", "split", "to_reference", "to_tensors"]
