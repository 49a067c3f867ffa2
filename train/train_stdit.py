"""Train or finetune STDiT3, the network of Open-Sora 1.2: text to clips, and to pictures, which are clips of a frame.

    python3 train/train_stdit.py configs/training/quickstart_video.yaml
    torchrun --nproc-per-node 8 train/train_stdit.py configs/training/stdit3_xl2.yaml

`generator_checkpoint_path` names what to start from: published weights, or those of a run. Sizes, lengths and their
micro-batches are those of `bucket_config`, or one of each; with `mask_ratios` some frames are given, and the network
learns to draw the others. Latents and texts are computed, or read from a cache (tools/cache.py). The run's folder gets
`generator.safetensors` with the published names.
"""

import warpcore.openmp

from torch import nn

from families.open_sora import build
from families.open_sora.config import OpenSoraConfig
from families.open_sora.training import OpenSoraTraining


class TrainStdit(OpenSoraTraining):
    Config = OpenSoraConfig

    def build(self) -> dict[str, nn.Module]:
        return {"generator": build.network(self.config)} | self.needed_encoders()


if __name__ == "__main__":
    TrainStdit.main()
