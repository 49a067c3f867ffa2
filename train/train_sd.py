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

from families.common.captions import captions_kept
from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.library_files import CONFIG_KEY, said_config
from families.stable_diffusion import build
from families.stable_diffusion.components import ZERO_SNR_KEY
from families.stable_diffusion.conditions import SIZES, TEXT, sizes_of, told
from families.stable_diffusion.config import SdFinetuneConfig
from families.stable_diffusion.lora import encoders_by_name, unread_notes
from families.stable_diffusion.training import SdTraining, with_text_rates
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class TrainSd(SdTraining):
    Config = SdFinetuneConfig

    def __init__(self, config: SdFinetuneConfig):
        super().__init__(config)
        if config.trains_text_encoders:
            self.trainable, self.texts = {"generator": {}, "text": {}}, None  # what captions mean changes
            self.config = with_text_rates(self.config)

    @property
    def texts_learn(self) -> bool:
        """Whether the text encoders, or something in them, are trained."""
        return self.config.trains_text_encoders

    @property
    def captions_vary(self) -> bool:
        return self.texts_learn or super().captions_vary

    def build(self) -> dict[str, nn.Module]:
        networks = {"generator": build.unet(self.config)} | self.needed_encoders()
        if self.config.trains_text_encoders:
            networks["text"].requires_grad_(True)
        return networks

    def setup(self) -> None:
        super().setup()
        for note in unread_notes(self.networks["text"], self.needs_geometry) if self.texts_learn else []:
            self.progress.say(note)

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
        # Gradients reach text encoders, adapters in them and tokens; nothing else has any. A cache has no tokens.
        others = self.networks.keys() & self.trainable.keys() - {"generator"}
        with torch.set_grad_enabled(any(self.networks[name].training for name in others)):
            return latents, self.conditions(batch, random)

    def conditions(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        """What the U-Net is told of each sample: its text, or the empty one, and for SDXL its size and crop."""
        texts = {name: stored(batch, name) for name in TEXT if name in self.features}
        if not texts or any(text is None for text in texts.values()):
            texts = self.text_conditions(batch.captions)
        own, empty = told(texts), told(self.text_conditions([""]))
        kept = captions_kept(random, self.config.caption_dropout)
        conditions = {
            name: torch.where(kept.view(-1, *[1] * (text.dim() - 1)), text, empty[name]) for name, text in own.items()
        }
        return conditions | ({SIZES: sizes_of(batch.geometry)} if self.needs_geometry else {})

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        texts = encoders_by_name(self.networks["text"]) if self.config.trains_text_encoders else {}
        own = {name: encoder.model.state_dict() for name, encoder in texts.items()}
        return {"generator": self.networks["generator"].state_dict()} | own

    def file_metadata(self) -> dict[str, str]:
        zero_snr = json.dumps(self.config.zero_terminal_snr)
        texts = encoders_by_name(self.networks["text"]) if self.config.trains_text_encoders else {}
        own = {f"{name}_{CONFIG_KEY}": json.dumps(encoder.config) for name, encoder in texts.items()}
        return super().file_metadata() | said_config(self.networks["generator"]) | {ZERO_SNR_KEY: zero_snr} | own


if __name__ == "__main__":
    TrainSd.main()
