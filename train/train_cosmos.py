"""Post-train Cosmos-Predict2 Text2Image (0.6B, 2B, 14B) on pictures with prompts.

    python3 train/train_cosmos.py configs/training/finetune_cosmos_2b.yaml
    torchrun --nproc-per-node 8 train/train_cosmos.py configs/training/finetune_cosmos_14b.yaml

`generator_checkpoint_path` names what to start from: a published `model.pt`, a published training run, or a folder of
diffusers. The run's folder gets `generator.safetensors`; tools/export.py makes a published file or a folder of
diffusers of it.
"""

import warpcore.openmp

from torch import nn

from families.common.library_files import said_config
from families.common.techniques.transformer import TransformerTechniques
from families.cosmos import build
from families.cosmos.config import CosmosConfig
from families.cosmos.training import CosmosTraining


class TrainCosmos(TransformerTechniques, CosmosTraining):
    Config = CosmosConfig

    def build(self) -> dict[str, nn.Module]:
        build.check_fits(self.config, *filter(self.needs_encoder, ("autoencoder", "text")))
        return self.with_techniques(build.transformer(self.config)) | self.needed_encoders()

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | said_config(self.networks["generator"])


if __name__ == "__main__":
    TrainCosmos.main()
