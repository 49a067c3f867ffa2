"""Train a Latte: the transformer that draws the latents of clips of a class, such as one of UCF101's actions.

    python3 train/train_latte.py configs/training/quickstart_latte.yaml
    torchrun --nproc-per-node 8 train/train_latte.py configs/training/latte_xl2_ucf101.yaml

Each sample is a video, of which `num_frames` frames are taken, and has a class as in train/train_dit.py. The
autoencoder sees frame by frame; a cache (tools/cache.py) holds its moments of whole clips. The run's folder gets
`generator.safetensors` with the published names; tools/export.py makes a published file of it.
"""

import warpcore.openmp
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from families.common.cache import Shape
from families.common.clip_training import CLIP_SETTINGS, ClipTraining
from families.common.clips import clip_moments, decoded_clips
from families.common.features import Feature
from families.common.pictures import to_pictures, to_uint8
from families.dit import build
from families.dit.class_training import ClassTraining
from families.dit.latte_config import DEFAULT_FPS, LatteConfig
from warpcore.core import Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class TrainLatte(ClipTraining, ClassTraining):
    Config = LatteConfig
    family = "latte"

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W) of the frames for which the network has positions: those of the largest bucket."""
        return max(self.config.buckets(self.bucket_factor).sizes, key=lambda size: size[1] * size[2])[1:]

    def build(self) -> dict[str, nn.Module]:
        return {"generator": build.dit(self.config, self.size_px)} | self.needed_encoders()

    # Classes, their dropout and the loss are those of `ClassTraining`.

    @property
    def features(self) -> dict[str, Feature]:
        return {"moments": Feature("autoencoder", CLIP_SETTINGS)}

    def read_shape(self, name: str) -> Shape:
        return (2 * self.config.version.network["in_channels"], None, None, None)  # frames, height, width

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        autoencoder, clips = self.networks["autoencoder"], batch.images  # uint8 (B, T, 3, H, W)
        return {"moments": clip_moments(autoencoder, clips, self.config.autoencoder_frames)}

    def feature_decoder(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        autoencoder = self.encoders()["autoencoder"]().eval().to(self.device)

        def decode(features: Mapping[str, Tensor]) -> Tensor:
            latents = autoencoder.scale.latents(features["moments"], None)
            return decoded_clips(autoencoder, latents, self.config.autoencoder_frames)

        return decode

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config, labels, shown = self.config, self.labels_to_draw(held_out), {}
        if held_out is not None and held_out.images is not None:
            shown = {"clip": to_uint8(held_out.images[: len(labels)])}
        size = (config.clip_frames, *self.size_px) if held_out is None else held_out.size
        latents = self.draw_latents(labels, size)
        drawn = to_pictures(decoded_clips(self.networks["autoencoder"], latents, config.autoencoder_frames))
        return Sampled.rows(self.titles(labels), shown | {"sample": drawn}, fps=config.frame_rate or DEFAULT_FPS)


if __name__ == "__main__":
    TrainLatte.main()
