"""Train or finetune Stage C: from text to the small latents of a picture.

python3 train/train_c.py configs/training/quickstart_c.yaml
torchrun --nproc-per-node 8 train/train_c.py configs/training/finetune_c_3b.yaml
"""

from functools import partial

import numpy as np
from torch import Tensor, nn

from cascade import build
from cascade.conditions import prompt_conditions, training_conditions
from cascade.config import StageCConfig
from cascade.diffusion import draw_latents, latent_size
from cascade.pictures import to_pictures, to_uint8
from cascade.training import DiffusionTraining
from modules.effnet import normalise_images
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.diffusion.guidance import Condition
from warpcore.random import SampleRandom, stable_hash


class TrainStageC(DiffusionTraining):
    Config = StageCConfig

    def build(self) -> dict[str, nn.Module]:
        config = self.config
        networks = {
            "generator": build.stage_c(config),
            "encoder": build.encoder(config),
            "previewer": build.previewer(config),
            "text": build.text(config),
        }
        if config.clip_image_dropout < 1:
            networks["image"] = build.image(config)
        self.image_width = networks["generator"].clip_img_mapper.in_features
        return networks

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        networks = self.networks
        latents = networks["encoder"](normalise_images(batch.images.float() / 255).to(self.dtype))
        conditions = training_conditions(
            networks["text"], networks.get("image"), self.image_width, batch, random, self.config
        )
        return latents.float(), conditions

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        prompts = (config.sample_prompts or (held_out.captions if held_out else []))[: config.sample_count]
        if not prompts:
            return []
        if config.sample_prompts:
            return Sampled.rows(prompts, self.draw(prompts, (config.image_size, config.image_size)))
        pictures = {"picture": to_uint8(held_out.images[: len(prompts)])}
        return Sampled.rows(prompts, pictures | self.draw(prompts, held_out.size))

    def draw(
        self, prompts: list[str], size: tuple[int, int], **further: tuple[Condition, Condition]
    ) -> dict[str, np.ndarray]:
        """Columns of drawings, uint8 (B, H, W, 3), by their name.

        further: more conditions by name, each as guidance pairs it: beside the prompts, and without them.
        """
        config, networks = self.config, self.networks
        height, width = size
        sides = [
            prompt_conditions(networks["text"], texts, self.image_width, self.device)
            | {name: pair[side] for name, pair in further.items()}
            for side, texts in enumerate((prompts, [""] * len(prompts)))
        ]
        latents = draw_latents(
            self.diffusion,
            networks["generator"],
            *sides,
            (16, *latent_size(height, width, networks["encoder"].compression, config.version.patch_size)),
            [stable_hash(config.seed, "sample", i) for i in range(len(prompts))],
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            sampler=config.sample_sampler,
        )
        return {"sample": to_pictures(networks["previewer"](latents.to(self.dtype)), size)}


if __name__ == "__main__":
    TrainStageC.main()
