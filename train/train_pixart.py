"""Train or finetune PixArt-alpha (256, 512, 1024-MS): the transformer that draws an autoencoder's latents for a text.

    python3 train/train_pixart.py configs/training/quickstart_pixart.yaml
    torchrun --nproc-per-node 8 train/train_pixart.py configs/training/pixart_xl2_512.yaml

`generator_checkpoint_path` names what to start from: a published file, or a folder of diffusers. Latents and texts are
computed, or read from a cache (tools/cache.py). The run's folder gets `generator.safetensors`; tools/export.py makes a
published file or a folder of diffusers of it.
"""

import warpcore.openmp

from torch import nn

from families.common.library_files import said_config
from families.common.techniques.transformer import TransformerTechniques
from families.dit import pixart_build
from families.dit.pixart_config import PixartConfig
from families.dit.pixart_training import PixartTraining


class TrainPixart(TransformerTechniques, PixartTraining):
    Config = PixartConfig

    def build(self) -> dict[str, nn.Module]:
        return self.with_techniques(pixart_build.denoiser(self.config)) | self.needed_encoders()

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | said_config(self.networks["generator"])


if __name__ == "__main__":
    TrainPixart.main()
