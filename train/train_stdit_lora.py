"""Teach STDiT3, the network of Open-Sora 1.2, a subject, a style or a motion with a small LoRA.

    python3 train/train_stdit_lora.py configs/training/stdit3_xl2_lora.yaml

The network is frozen, and adapters of its layers are trained: see `families.common.transformer_lora.TransformerLora`.
The run's folder gets `lora.safetensors`; tools/export.py puts it into published weights (`published`, with `lora`).
"""

import warpcore.openmp

from families.common.transformer_lora import TransformerLora
from families.open_sora.lora_config import OpenSoraLoraConfig
from train.train_stdit import TrainStdit


class TrainStditLora(TransformerLora, TrainStdit):
    Config = OpenSoraLoraConfig


if __name__ == "__main__":
    TrainStditLora.main()
