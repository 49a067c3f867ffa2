"""Train a DiT: the transformer that draws the latents of an autoencoder for a class, such as one of ImageNet's.

    python3 train/train_dit.py configs/training/quickstart_dit.yaml
    torchrun --nproc-per-node 8 train/train_dit.py configs/training/dit_xl2_256.yaml

Each sample has a class: the number in its `.cls`, or what `class_getter` makes of another member. Latents are drawn
from moments, which are computed, or read from a cache (tools/cache.py); a cache has the classes too. The run's folder
gets `generator.safetensors` with the published names; tools/export.py makes a published file of it.
"""

import warpcore.openmp

from torch import nn

from families.common.pictures import to_pictures, to_uint8
from families.common.techniques.transformer import TransformerTechniques
from families.dit import build
from families.dit.class_training import ClassTraining
from families.dit.config import DitConfig
from warpcore.core import Sampled
from warpcore.data.reader import Batch


class TrainDit(TransformerTechniques, ClassTraining):
    Config = DitConfig
    family = "dit"

    def build(self) -> dict[str, nn.Module]:
        return self.with_techniques(build.dit(self.config, self.size_px)) | self.needed_encoders()

    # Moments of pictures, classes, their dropout and the loss are those of `ClassTraining`.

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        labels, shown = self.labels_to_draw(held_out), {}
        if held_out is not None and held_out.images is not None:
            shown = {"picture": to_uint8(held_out.images[: len(labels)])}
        latents = self.draw_latents(labels, self.size_px if held_out is None else held_out.size)
        drawn = to_pictures(self.networks["autoencoder"].decode(latents))
        return Sampled.rows(self.titles(labels), shown | {"sample": drawn})


if __name__ == "__main__":
    TrainDit.main()
