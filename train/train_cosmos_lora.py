"""Teach Cosmos-Predict2 Text2Image a subject or a style with a small LoRA.

    python3 train/train_cosmos_lora.py configs/training/finetune_cosmos_2b_lora.yaml

The denoiser is frozen, and adapters of its layers are trained: see `families.common.transformer_lora.TransformerLora`.
The run's folder gets `lora.safetensors`; tools/export.py writes it for diffusers, for ComfyUI, and in the published
names.
"""

import warpcore.openmp

from families.common.transformer_lora import TransformerLora
from families.cosmos.lora_config import CosmosLoraConfig
from train.train_cosmos import TrainCosmos


class TrainCosmosLora(TransformerLora, TrainCosmos):
    Config = CosmosLoraConfig


if __name__ == "__main__":
    TrainCosmosLora.main()
