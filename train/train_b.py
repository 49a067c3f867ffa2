"""Train or finetune Stage B: from the small latents of a picture, and its text, to the latents of Stage A.

python3 train/train_b.py configs/training/mini_b.yaml
torchrun --nproc-per-node 8 train/train_b.py configs/training/finetune_b_700m.yaml
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from cascade import build
from cascade.conditions import kept_captions, text_conditions
from cascade.config import DiffusionConfig
from cascade.diffusion import draw_latents, pyramid_noise
from cascade.pictures import to_pictures, to_uint8
from cascade.training import DiffusionTraining
from modules.blocks import resize
from modules.effnet import normalise_images
from warpcore.config import Share
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom, stable_hash


class StageBConfig(DiffusionConfig):
    model_version: Literal["3B", "700M", "mini"] = "3B"
    """Size of Stage B, and with it of the networks around it; `mini` is a toy cascade for 128 px pictures."""
    effnet_scale: tuple[Share, Share] = (0.5, 1.0)
    """The encoder sees the picture scaled down by a random factor between these; smaller ones teach Stage B to work
    from fewer latents, which is a higher compression."""
    effnet_dropout: Share = 0.1
    """Share of the samples without the encoder's latents."""
    train_encoder: bool = False
    """Train the encoder too, so that its latents say what Stage B needs."""
    sample_steps: PositiveInt = 10
    """Sampling steps of the pictures drawn at every save."""
    sample_guidance: float = 1.1
    """Classifier-free guidance of those pictures."""

    @model_validator(mode="after")
    def _ordered(self):
        low, high = self.effnet_scale
        if not 0 < low <= high:
            raise ValueError(f"effnet_scale: {low}, {high} is no range; write the smaller factor first, above 0")
        return self


class TrainStageB(DiffusionTraining):
    Config = StageBConfig

    def build(self) -> dict[str, nn.Module]:
        config = self.config
        if config.train_encoder:
            self.trainable = {"generator": {}, "encoder": {}}
        return {
            "generator": build.stage_b(config),
            "stage_a": build.stage_a(config),
            "encoder": build.encoder(config),
            "text": build.text(config),
        }

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        pictures = batch.images.float() / 255
        latents = self.networks["stage_a"].encode(pictures.to(self.dtype)).float()
        captions = kept_captions(batch, random, self.config.caption_dropout)
        text = text_conditions(self.networks["text"], captions, self.device)["clip_text_pooled"]
        seen = None if self.config.train_encoder else self._encoder_latents(pictures, random)
        return latents, text, seen, pictures

    def loss(self, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], random: SampleRandom) -> Losses:
        latents, text, effnet, pictures = inputs
        effnet = self._encoder_latents(pictures, random) if effnet is None else effnet
        shown = random.uniform("effnet dropout") >= self.config.effnet_dropout
        conditions = {"effnet": effnet * shown[:, None, None, None], "clip": text}
        noise = pyramid_noise(random, latents.shape[1], latents.shape[2:], size_range=(1, 16))
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions), noise)

    def _encoder_latents(self, pictures: Tensor, random: SampleRandom) -> Tensor:
        """The encoder's latents (B, 16, h, w) of pictures scaled down, each by its own factor, to a side that the
        encoder divides; then all enlarged to the positions of Stage B, as it would do itself."""
        encoder, generator = self.networks["encoder"], self.networks["generator"]
        size = pictures.shape[2:]
        low, high = self.config.effnet_scale
        factors = low + (high - low) * random.uniform("effnet scale")
        if self.config.train_encoder:  # its batch norms want to see the micro-batch as a whole
            factors = factors[:1].expand(len(pictures))
        sizes = [tuple(_multiple(side * factor, encoder.compression) for side in size) for factor in factors.tolist()]
        positions = [side // self.networks["stage_a"].compression // generator.patch_size for side in size]
        parts, order = [], []
        for scaled in dict.fromkeys(sizes):
            rows = [i for i, other in enumerate(sizes) if other == scaled]
            small = F.interpolate(pictures[rows], scaled, mode="bilinear", antialias=True)
            latents = encoder(normalise_images(small).to(self.dtype)).float()
            parts.append(resize(latents.permute(0, 2, 3, 1), positions).permute(0, 3, 1, 2))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=pictures.device).argsort()]

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        if held_out is None:
            return []
        config, networks = self.config, self.networks
        images = held_out.images[: config.sample_count].to(self.device)
        pictures, captions = images.float() / 255, held_out.captions[: len(images)]
        stage_a = networks["stage_a"]
        effnet = networks["encoder"](normalise_images(pictures).to(self.dtype)).float()
        texts = [*captions, *[""] * len(captions)]
        text, no_text = text_conditions(networks["text"], texts, self.device)["clip_text_pooled"].chunk(2)
        latents = draw_latents(
            self.diffusion,
            networks["generator"],
            {"effnet": effnet, "clip": text},
            {"effnet": torch.zeros_like(effnet), "clip": no_text},
            (4, *(side // stage_a.compression for side in held_out.size)),
            [stable_hash(config.seed, "sample", i) for i in range(len(images))],
            steps=config.sample_steps, guidance=config.sample_guidance, sampler=config.sample_sampler,
        )  # fmt: skip
        columns = {
            "picture": to_uint8(images),
            "Stage A": to_pictures(stage_a.decode(stage_a.encode(pictures.to(self.dtype)))),
            "Stage B": to_pictures(stage_a.decode(latents.to(self.dtype))),
        }
        return Sampled.rows(captions, columns)


def _multiple(length: float, of: int) -> int:
    return max(1, round(length / of)) * of


if __name__ == "__main__":
    TrainStageB.main()
