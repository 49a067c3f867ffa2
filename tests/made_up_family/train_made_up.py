"""Train the denoiser of the made-up family, or a LoRA on it.

python3 tests/made_up_family/train_made_up.py CONFIG
"""

import warpcore.openmp
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from families.common.config import DiffusionConfig
from families.common.features import CAPTION_SETTINGS, PICTURE_SETTINGS, Feature, stored
from families.common.lora import add_adapters
from families.common.pictures import to_pictures
from families.common.sampling import draw_latents, sample_seeds
from families.common.training import DiffusionTraining
from families.common.weights import existing_file
from modules.lora import LoraSettings
from tests.made_up_family import settings
from tests.made_up_family.networks import COMPRESSION
from warpcore.core import Losses, Sampled


class MadeUpConfig(settings.MadeUpSettings, DiffusionConfig):
    loss_weight: Literal["constant", "min_snr"] = "constant"
    """How much the loss of each noise level counts."""
    rank: PositiveInt | None = None
    """Train a LoRA of this rank in place of all weights."""


class TrainMadeUp(DiffusionTraining):
    Config = MadeUpConfig
    family = "made_up_family"
    bucket_factor = COMPRESSION
    drawn_with = frozenset({"squeeze"})
    features = {
        "latent": Feature("squeeze", PICTURE_SETTINGS), "letters": Feature("text", CAPTION_SETTINGS[:1]),
    }  # fmt: skip

    def make_diffusion(self, loss_weight, convert_weight):
        return settings.process(self.config, loss_weight)

    def encoders(self):
        return {"squeeze": partial(settings.squeeze, self.config), "text": partial(settings.letters, self.config)}

    def network_file(self, network: str) -> Path:
        key = {"squeeze": "squeeze_path", "text": "letters_path"}[network]
        return existing_file(getattr(self.config, key), key)

    def build(self) -> dict[str, nn.Module]:
        generator = settings.cloud(self.config)
        if self.config.rank:
            generator.requires_grad_(False)
            add_adapters(generator, ["puffs"], LoraSettings(self.config.rank, alpha=self.config.rank))
        return {"generator": generator} | self.needed_encoders()

    def picture_features(self, batch, random):
        return {"latent": self.networks["squeeze"].encode(batch.images.float() / 255).float()}

    def feature_decoder(self):
        squeeze = settings.squeeze(self.config)
        return lambda features: squeeze.decode(features["latent"])

    def text_features(self, encoder, captions):
        return {"letters": encoder(captions).float()}

    def encode(self, batch, random) -> tuple[Tensor, Tensor]:
        latents, letters = stored(batch, "latent"), stored(batch, "letters")
        latents = self.picture_features(batch, random)["latent"] if latents is None else latents.float()
        return latents, self.text_conditions(batch.captions)["letters"] if letters is None else letters.float()

    def loss(self, inputs, random) -> Losses:
        latents, letters = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], letters=letters))

    def sample(self, held_out) -> list[Sampled]:
        config, texts = self.config, held_out.captions[: self.config.sample_count]
        sides = [self.text_conditions(side) for side in (texts, [""] * len(texts))]
        shape = (self.networks["generator"].channels, *(side // COMPRESSION for side in held_out.size))
        seeds = sample_seeds(config.seed, len(texts))
        drawn = draw_latents(self.diffusion, self.networks["generator"], *sides, shape, seeds, sampler="ddim",
                             steps=config.sample_steps, guidance=config.sample_guidance)  # fmt: skip
        return Sampled.rows(texts, {"sample": to_pictures(self.networks["squeeze"].decode(drawn))})

    def weights(self) -> dict[str, dict[str, Tensor]]:
        state = self.networks["generator"].state_dict()
        adapters = {name: tensor for name, tensor in state.items() if ".lora." in name}
        return {"lora": adapters} if self.config.rank else {"generator": state}


if __name__ == "__main__":
    TrainMadeUp.main()
