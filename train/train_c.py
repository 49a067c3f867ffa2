"""Train or finetune Stage C: from text to the small latents of a picture.

python3 train/train_c.py configs/training/quickstart_c.yaml
torchrun --nproc-per-node 8 train/train_c.py configs/training/finetune_c_3b.yaml
"""

import warpcore.openmp
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from families.cascade import build
from families.cascade.conditions import TEXT, training_conditions
from families.cascade.config import StageCConfig
from families.cascade.training import DenoiserTraining
from families.common.family import TEXT_TO_IMAGE
from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.next_commands import drawing_commands, first_prompt, size_keys
from families.common.pictures import to_pictures, to_uint8
from families.common.sampling import draw_latents, latent_size, sample_seeds
from modules.effnet import normalise_images
from warpcore.core import Losses, Sampled
from warpcore.data.buckets import whole_size
from warpcore.data.reader import Batch
from warpcore.diffusion.guidance import Condition
from warpcore.random import SampleRandom


class TrainStageC(DenoiserTraining):
    Config = StageCConfig

    def build(self) -> dict[str, nn.Module]:
        networks = {"generator": build.stage_c(self.config)}
        if build.has_previewer(self.config):
            networks["previewer"] = build.previewer(self.config)
        else:
            self.cannot_draw = (
                "no sample pictures are drawn: there are no weights of the previewer in "
                f"{build.previewer_file(self.config)} (previewer_checkpoint_path; models/download.py fetches them)"
            )
        return networks | self.needed_encoders()

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_prompts

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        config = self.config
        encoders = {
            "encoder": lambda: build.encoder(config),
            "text": lambda: build.text(config, self.kept["tokenizer"]),
        }
        return encoders | ({"image": lambda: build.image(config)} if config.clip_image_dropout < 1 else {})

    @property
    def features(self) -> dict[str, Feature]:
        features = {"latent": Feature("encoder", PICTURE_SETTINGS)}
        features |= self.caption_features_to_cache(*TEXT)
        if self.config.clip_image_dropout < 1:
            features["clip_img"] = Feature("image", PICTURE_SETTINGS)
        return features | self.mask_feature("encoder")

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        features = {"latent": self.latents(batch)}
        if "image" in self.networks:
            features["clip_img"] = self.networks["image"].encode(batch.images.float() / 255)
        return features | self.mask_of_pictures(batch, features["latent"])

    def latents(self, batch: Batch) -> Tensor:
        """The encoder's latents (B, 16, h, w) of a batch."""
        latents = stored(batch, "latent")
        if latents is None:
            latents = self.networks["encoder"](normalise_images(batch.images.float() / 255).to(self.dtype))
        return latents.float()

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        image, width = self.networks.get("image"), self.config.version.image_width
        conditions = training_conditions(self.text_conditions, image, width, batch, random, self.config)
        return self.latents(batch), conditions

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def next_commands(self) -> list[str]:
        version = self.config.version
        size = size_keys(self.config, version.compression / version.encoder_compression)
        return drawing_commands(TEXT_TO_IMAGE, self.config, prompts=first_prompt(self.config), **size)

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        prompts = (config.sample_prompts or held_out.captions)[: config.sample_count]
        if config.sample_prompts:
            return Sampled.rows(prompts, self.draw(prompts, whole_size(config.image_size)))
        if held_out.images is None:
            picture = self.preview(self.latents(held_out)[: len(prompts)], held_out.size)
        else:
            picture = to_uint8(held_out.images[: len(prompts)])
        return Sampled.rows(prompts, {"picture": picture} | self.draw(prompts, held_out.size))

    def preview(self, latents: Tensor, size: tuple[int, int]) -> np.ndarray:
        """What the previewer makes of latents (B, 16, h, w): uint8 (B, H, W, 3) of `size` (H, W)."""
        return to_pictures(self.networks["previewer"](latents.to(self.dtype)), size)

    def draw(
        self, prompts: list[str], size: tuple[int, int], **further: tuple[Condition, Condition]
    ) -> dict[str, np.ndarray]:
        """Columns of drawings, uint8 (B, H, W, 3), by their name.

        further: more conditions by name, each as guidance pairs it: beside the prompts, and without them.
        """
        config, networks = self.config, self.networks
        generator, (height, width) = networks["generator"], size
        no_image = torch.zeros(len(prompts), 1, config.version.image_width, device=self.device)
        sides = [
            self.text_conditions(texts) | {"clip_img": no_image} | {name: pair[side] for name, pair in further.items()}
            for side, texts in enumerate((prompts, [""] * len(prompts)))
        ]
        latents = draw_latents(
            self.diffusion,
            generator,
            *sides,
            (generator.c_in, *latent_size(height, width, config.version.encoder_compression, generator.patch_size)),
            sample_seeds(config.seed, len(prompts)),
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            sampler=config.sample_sampler,
        )
        return {"sample": self.preview(latents, size)}


if __name__ == "__main__":
    TrainStageC.main()
