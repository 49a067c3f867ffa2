"""Train or finetune Stable Diffusion 1.5 or SDXL: the U-Net that draws the autoencoder's latents for a text.

    python3 train/train_sd.py configs/training/quickstart_sd.yaml
    torchrun --nproc-per-node 8 train/train_sd.py configs/training/finetune_sdxl.yaml

`generator_checkpoint_path` names what to start from: a pipeline of diffusers, or a checkpoint in one file, as A1111
and ComfyUI have it. Everything is trained, or what `parameter_groups` leave. The run's folder gets
`generator.safetensors`; tools/export.py makes a pipeline or a checkpoint in one file of it.
"""

import warpcore.openmp
import json
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.library_files import CONFIG_KEY, constructor_numbers
from families.common.pictures import to_uint8
from families.stable_diffusion import build
from families.stable_diffusion.components import ZERO_SNR_KEY
from families.stable_diffusion.conditions import SIZES, TEXT, sizes_of, told
from families.stable_diffusion.config import SdConfig
from families.stable_diffusion.training import SdTraining
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class TrainSd(SdTraining):
    Config = SdConfig

    def build(self) -> dict[str, nn.Module]:
        return {"generator": build.unet(self.config)} | self.needed_encoders()

    @property
    def features(self) -> dict[str, Feature]:
        texts = self.caption_features_to_cache(*TEXT if self.needs_geometry else ("text",))
        return {"moments": Feature("autoencoder", PICTURE_SETTINGS)} | self.mask_feature("autoencoder") | texts

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        moments = self.networks["autoencoder"].moments(batch.images)
        return {"moments": moments} | self.mask_of_pictures(batch, moments)

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        pooled = {"text_pooled": made.pooled.float()} if self.needs_geometry else {}
        return {"text": made.hidden.float()} | pooled

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        moments = stored(batch, "moments")
        moments = self.picture_features(batch, random)["moments"] if moments is None else moments
        latents = self.latents[0].latents(moments, random if self.config.latent == "sample" else None)
        return latents, self.conditions(batch, random)

    def conditions(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """What the U-Net is told of each sample: its text, or the empty one, and for SDXL its size and crop."""
        texts = {name: stored(batch, name) for name in TEXT if name in self.features}
        if not texts or any(text is None for text in texts.values()):
            texts = self.text_conditions(batch.captions)
        own, empty = told(texts), told(self.text_conditions([""]))
        kept = random.uniform("caption dropout") >= self.config.caption_dropout
        conditions = {
            name: torch.where(kept.view(-1, *[1] * (text.dim() - 1)), text, empty[name]) for name, text in own.items()
        }
        return conditions | ({SIZES: sizes_of(batch.geometry)} if self.needs_geometry else {})

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        if config.sample_prompts:
            prompts, size = config.sample_prompts[: config.sample_count], (config.image_size, config.image_size)
            return Sampled.rows(prompts, self.draw(prompts, size))
        prompts = held_out.captions[: config.sample_count]
        shown = {} if held_out.images is None else {"picture": to_uint8(held_out.images[: len(prompts)])}
        return Sampled.rows(prompts, shown | self.draw(prompts, held_out.size))

    def file_metadata(self) -> dict[str, str]:
        config = constructor_numbers(dict(self.networks["generator"].config))
        zero_snr = json.dumps(self.config.zero_terminal_snr)
        return super().file_metadata() | {CONFIG_KEY: json.dumps(config), ZERO_SNR_KEY: zero_snr}


if __name__ == "__main__":
    TrainSd.main()
