"""Train or finetune Stable Diffusion 1.5 or SDXL: the U-Net that draws the autoencoder's latents for a text.

    python3 train/train_sd.py configs/training/quickstart_sd.yaml
    torchrun --nproc-per-node 8 train/train_sd.py configs/training/finetune_sdxl.yaml

`generator_checkpoint_path` names what to start from: a pipeline of diffusers, or a checkpoint in one file, as A1111
and ComfyUI have it. Everything is trained, or what `parameter_groups` leave. The run's folder gets
`generator.safetensors`; tools/export.py makes a pipeline or a checkpoint in one file of it.
"""

import warpcore.openmp
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from families.common.autoencoders import LatentScale
from families.common.features import CAPTION_SETTINGS, PICTURE_SETTINGS, Feature, stored
from families.common.library_files import CONFIG_KEY, constructor_numbers
from families.common.pictures import to_pictures, to_uint8
from families.common.sampling import draw_latents
from families.common.training import DiffusionTraining
from families.stable_diffusion import build
from families.stable_diffusion.conditions import SIZES, TEXT, sizes_of, told, whole_pictures
from families.stable_diffusion.config import SdConfig
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom, stable_hash


class TrainSd(DiffusionTraining):
    Config = SdConfig
    family = "stable_diffusion"
    about_network = ("model_version",)
    drawn_with = frozenset({"autoencoder"})

    # --- networks

    def build(self) -> dict[str, nn.Module]:
        return {"generator": build.unet(self.config)} | self.needed_encoders()

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        config = self.config
        return {
            "autoencoder": lambda: build.autoencoder(config),
            "text": lambda: build.text_encoders(config, self.device),
        }

    def network_file(self, network: str) -> Path:
        return build.network_file(self.config, network)

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return build.process(self.config, loss_weight, self.config.offset_noise)

    @cached_property
    def latents(self) -> tuple[LatentScale, int]:
        """The scale of latents, and the pixels per position of them and side."""
        return build.latents_of(self.config)

    @property
    def bucket_factor(self) -> int:
        return self.latents[1] * self.config.version.latent_factor

    @property
    def needs_geometry(self) -> bool:
        return self.config.version.sees_sizes

    # --- what a cache holds

    @property
    def features(self) -> dict[str, Feature]:
        names = ("text", "text_pooled") if self.config.version.sees_sizes else ("text",)
        return {"moments": Feature("autoencoder", PICTURE_SETTINGS)} | {
            name: Feature("text", CAPTION_SETTINGS[:1]) for name in names
        }

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        return {"moments": self.networks["autoencoder"].moments(batch.images)}

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        made = encoder(list(captions))
        return {"text": made.hidden.float()} | (
            {"text_pooled": made.pooled.float()} if self.config.version.sees_sizes else {}
        )

    # --- an update

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        moments = stored(batch, "moments")
        moments = self.picture_features(batch, random)["moments"] if moments is None else moments
        latents = self.latents[0].latents(moments, random if self.config.latent == "sample" else None)
        return latents, self.conditions(batch, random)

    def conditions(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """What the U-Net is told of each sample: its text, or the empty one, and for SDXL its size and crop."""
        made = {name: stored(batch, name) for name in TEXT if name in self.features}
        made = self.text_conditions(batch.captions) if None in made.values() or not made else made
        own, empty = told(made), told(self.text_conditions([""]))
        kept = random.uniform("caption dropout") >= self.config.caption_dropout
        conditions = {
            name: torch.where(kept.view(-1, *[1] * (text.dim() - 1)), text, empty[name]) for name, text in own.items()
        }
        return conditions | ({SIZES: sizes_of(batch.geometry)} if self.needs_geometry else {})

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    # --- pictures and files

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        if config.sample_prompts:
            prompts, size = config.sample_prompts[: config.sample_count], (config.image_size, config.image_size)
            return Sampled.rows(prompts, self.draw(prompts, size))
        self.know_captions(held_out)
        prompts, size = held_out.captions[: config.sample_count], held_out.size
        shown = {} if held_out.images is None else {"picture": to_uint8(held_out.images[: len(prompts)])}
        return Sampled.rows(prompts, shown | self.draw(prompts, size))

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_prompts

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict:
        """Columns of drawings, uint8 (B, H, W, 3), by their name."""
        config, autoencoder = self.config, self.networks["autoencoder"]
        sides = [told(self.text_conditions(texts)) for texts in (prompts, [""] * len(prompts))]
        if self.needs_geometry:
            sides = [side | {SIZES: whole_pictures(len(prompts), size, self.device)} for side in sides]
        latents = draw_latents(
            self.diffusion, self.networks["generator"], *sides,
            (autoencoder.latent_channels, *(side // autoencoder.compression for side in size)),
            [stable_hash(config.seed, "sample", i) for i in range(len(prompts))],
            steps=config.sample_steps, guidance=config.sample_guidance, sampler=config.sample_sampler,
        )  # fmt: skip
        return {"sample": to_pictures(autoencoder.decode(latents))}

    def file_metadata(self) -> dict[str, str]:
        config = constructor_numbers(dict(self.networks["generator"].config))
        return super().file_metadata() | {CONFIG_KEY: json.dumps(config)}


if __name__ == "__main__":
    TrainSd.main()
