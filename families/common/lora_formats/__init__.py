"""What a LoRA file holds, in our names and in those of other programs, for any network."""

from families.common.lora_formats.adapters import Adapter, FactorAdapter, Lora, LoraFileError, OneAdapter, split
from families.common.lora_formats.ours import metadata, to_tensors

__all__ = ["Adapter", "FactorAdapter", "Lora", "LoraFileError", "OneAdapter", "metadata", "split", "to_tensors"]
