"""Teach PixArt-alpha a subject or a style with a small LoRA.

    python3 train/train_pixart_lora.py configs/training/pixart_xl2_512_lora.yaml

The denoiser is frozen. The run's folder gets `lora.safetensors`; tools/export.py writes it for diffusers, and in the
form of kohya's scripts.
"""

import warpcore.openmp

from torch import Tensor, nn

from families.common.library_files import CONFIG_KEY
from families.common.lora import add_adapters
from families.common.lora_files import metadata
from families.common.lora_training import freeze, lora_of, lora_tensors, start_from
from families.dit.pixart_lora import TRANSFORMER, read_lora
from families.dit.pixart_lora_config import PixartLoraConfig
from modules.lora import without_adapters
from train.train_pixart import TrainPixart


class TrainPixartLora(TrainPixart):
    Config = PixartLoraConfig
    start_files = ("generator_checkpoint_path", "lora_checkpoint_path")
    frozen_base = True

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        network = networks["generator"]
        freeze(network, config.frozen_weights or self.dtype, self.processes)
        add_adapters(network, config.module_filters, config.lora_settings)
        if config.lora_checkpoint_path:
            start_from(read_lora(config.lora_checkpoint_path, network), network, None, config.lora_checkpoint_path)
        return networks

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict:
        """Drawings without and with the LoRA, from the same noise."""
        with without_adapters(self.networks["generator"]):
            base = super().draw(prompts, size)["sample"]
        return {"base": base, "LoRA": super().draw(prompts, size)["sample"]}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        own = lora_tensors(self.networks["generator"], None)
        return {"lora": {f"{TRANSFORMER}.{name}": tensor for name, tensor in own.items()}}

    def file_metadata(self) -> dict[str, str]:
        about = metadata({TRANSFORMER: lora_of(self.networks["generator"])})
        return {key: value for key, value in super().file_metadata().items() if key != CONFIG_KEY} | about


if __name__ == "__main__":
    TrainPixartLora.main()
