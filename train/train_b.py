"""Train or finetune Stage B: from the small latents of a picture, and its text, to the latents of Stage A.

python3 train/train_b.py configs/training/mini_b.yaml
torchrun --nproc-per-node 8 train/train_b.py configs/training/finetune_b_700m.yaml
"""

import warpcore.openmp
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from families.cascade import build
from families.cascade.conditions import training_text
from families.cascade.config import StageBConfig
from families.cascade.diffusion import pyramid_noise
from families.cascade.scaled import encode_scaled, enlarge
from families.cascade.training import DenoiserTraining
from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.pictures import to_pictures, to_uint8
from families.common.sampling import draw_latents, sample_seeds
from modules.effnet import normalise_images
from warpcore.config import ConfigError
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom

Inputs = tuple[Tensor, Tensor, Sequence[Tensor] | None, Tensor | None]


class TrainStageB(DenoiserTraining):
    Config = StageBConfig
    drawn_with = frozenset({"stage_a"})

    def build(self) -> dict[str, nn.Module]:
        if self.config.train_encoder:
            self.trainable = {"generator": {}, "encoder": {}}
        return {"generator": build.stage_b(self.config)} | self.needed_encoders()

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        config = self.config
        return {
            "stage_a": lambda: build.stage_a(config),
            "encoder": lambda: build.encoder(config),
            "text": lambda: build.text(config, self.kept["tokenizer"]),
        }

    def check_cacheable(self) -> None:
        super().check_cacheable()
        if self.config.train_encoder:
            raise ConfigError("train_encoder: the encoder that is trained needs pictures, not a cache of its latents")

    @property
    def features(self) -> dict[str, Feature]:
        return {
            "stage_a": Feature("stage_a", PICTURE_SETTINGS),
            "effnet": Feature("encoder", (*PICTURE_SETTINGS, "effnet_scale")),
            **self.caption_features_to_cache("clip_text_pooled"),
            **self.mask_feature("stage_a"),
        }

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor | list[Tensor]]:
        pictures = batch.images.float() / 255
        latents = self.networks["stage_a"].encode(pictures.to(self.dtype)).float()
        features = {"stage_a": latents} | self.mask_of_pictures(batch, latents)
        if self.config.train_encoder:
            return features
        factors = self._factors(len(pictures), random)
        return features | {"effnet": encode_scaled(self.networks["encoder"], pictures, factors, self.dtype)}

    def encode(self, batch: Batch, random: SampleRandom) -> Inputs:
        text = training_text(self.text_conditions, batch, random, self.config.caption_dropout)["clip_text_pooled"]
        if batch.images is None:
            return stored(batch, "stage_a").float(), text, stored(batch, "effnet"), None
        features = self.picture_features(batch, random)
        return features["stage_a"], text, features.get("effnet"), batch.images.float() / 255

    def loss(self, inputs: Inputs, random: SampleRandom) -> Losses:
        latents, text, effnet, pictures = inputs
        if effnet is None:  # the encoder is trained
            factors = self._factors(len(pictures), random)
            effnet = encode_scaled(self.networks["encoder"], pictures, factors, self.dtype)
        effnet = self._enlarged(effnet, latents)
        shown = random.uniform("effnet dropout") >= self.config.effnet_dropout
        conditions = {"effnet": effnet * shown[:, None, None, None], "clip": text}
        noise = pyramid_noise(random, latents.shape[1], latents.shape[2:], size_range=(1, 16))
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions), noise)

    def _factors(self, count: int, random: SampleRandom) -> list[float]:
        """By how much each of a micro-batch's pictures is scaled down before the encoder sees it."""
        low, high = self.config.effnet_scale
        factors = low + (high - low) * random.on_cpu.uniform("effnet scale")
        if self.config.train_encoder:  # its batch norms want to see the micro-batch as a whole
            factors = factors[:1].expand(count)
        return factors.tolist()

    def _enlarged(self, seen: Sequence[Tensor], latents: Tensor) -> Tensor:
        """Those latents at the positions (B, 16, H, W) that Stage B has for its own."""
        positions = [side // self.networks["generator"].patch_size for side in latents.shape[2:]]
        return enlarge(seen, positions, self.device)

    def sample(self, held_out: Batch) -> list[Sampled]:
        config, networks = self.config, self.networks
        count, stage_a = min(config.sample_count, len(held_out.keys)), networks["stage_a"]
        captions = held_out.captions[:count]
        if held_out.images is None:
            encoded = stored(held_out, "stage_a")[:count]
            effnet, columns = self._enlarged(stored(held_out, "effnet")[:count], encoded), {}
        else:
            pictures = held_out.images[:count].to(self.device).float() / 255
            encoded = stage_a.encode(pictures.to(self.dtype))
            effnet = networks["encoder"](normalise_images(pictures).to(self.dtype)).float()
            columns = {"picture": to_uint8(held_out.images[:count])}
        texts = [*captions, *[""] * len(captions)]
        text, no_text = self.text_conditions(texts)["clip_text_pooled"].chunk(2)
        latents = draw_latents(
            self.diffusion,
            networks["generator"],
            {"effnet": effnet, "clip": text},
            {"effnet": torch.zeros_like(effnet), "clip": no_text},
            (networks["generator"].c_in, *(side // stage_a.compression for side in held_out.size)),
            sample_seeds(config.seed, count),
            steps=config.sample_steps, guidance=config.sample_guidance, sampler=config.sample_sampler,
        )  # fmt: skip
        for name, drawn in (("Stage A", encoded), ("Stage B", latents)):
            columns[name] = to_pictures(stage_a.decode(drawn.to(self.dtype)))
        return Sampled.rows(captions, columns)


if __name__ == "__main__":
    TrainStageB.main()
