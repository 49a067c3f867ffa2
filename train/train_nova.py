"""Train or finetune NOVA: text to pictures, or to clips, frame after frame and each in groups of tokens.

    python3 train/train_nova.py configs/training/quickstart_nova.yaml
    torchrun --nproc-per-node 8 train/train_nova.py configs/training/nova_0.3b.yaml

With `num_frames: 1` pictures are learned, of texts, or with `num_classes` of classes; else clips, where published
networks went on from those of pictures. `generator_checkpoint_path` names what to start from: a published folder, or
weights of a run; clips may begin with those of pictures. Moments and texts are computed, or read from a cache
(tools/cache.py). The run's folder gets `generator.safetensors` with the published names.
"""

import warpcore.openmp

from torch import nn

from families.nova import build
from families.nova.config import NovaConfig
from families.nova.training import NovaTraining


class TrainNova(NovaTraining):
    Config = NovaConfig

    def build(self) -> dict[str, nn.Module]:
        network = build.network(self.config, self.size_px, from_pictures=True)
        return {"generator": network} | self.needed_encoders()


if __name__ == "__main__":
    TrainNova.main()
