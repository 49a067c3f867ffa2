"""Teach PixArt-alpha a subject or a style with a small LoRA.

    python3 train/train_pixart_lora.py configs/training/pixart_xl2_512_lora.yaml

The denoiser is frozen, and adapters of its layers are trained: see `families.common.transformer_lora.TransformerLora`.
The run's folder gets `lora.safetensors`; tools/export.py writes it for diffusers, and in the form of kohya's scripts.
"""

import warpcore.openmp

from families.common.transformer_lora import TransformerLora
from families.dit.pixart_lora_config import PixartLoraConfig
from train.train_pixart import TrainPixart


class TrainPixartLora(TransformerLora, TrainPixart):
    Config = PixartLoraConfig


if __name__ == "__main__":
    TrainPixartLora.main()
