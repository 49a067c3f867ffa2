"""Teach Stage C a subject or a style with a small LoRA and, if wanted, tokens of its own.

python3 train/train_c_lora.py configs/training/quickstart_lora.yaml
python3 train/train_c_lora.py configs/training/finetune_c_3b_lora.yaml

Stage C is frozen. The run's folder gets `lora.safetensors`, which holds the adapters and the tokens.
"""

import warpcore.openmp
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.cascade import lora
from families.cascade.conditions import TEXT
from families.cascade.lora_config import LoraConfig, choose_captions, listed, sample_fields, texts_read
from families.cascade.lora_formats import metadata
from families.common.captions import unused_tokens
from families.common.features import PICTURE_SETTINGS, Feature, stored
from modules.lora import without_adapters
from modules.tokens import untrained
from train.train_c import TrainStageC
from warpcore.core import Losses, Sampled
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

Inputs = tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor]


class TrainLora(TrainStageC):
    Config = LoraConfig
    start_files = ("generator_checkpoint_path", "lora_checkpoint_path")
    frozen_base = True

    def __init__(self, config: LoraConfig):
        super().__init__(config)
        self.trainable = {"generator": {}}
        if config.train_tokens:
            self.trainable["tokens"] = {"lr_scale": config.token_lr_scale}
            self.texts = None  # what captions say changes with the tokens, whose gradient a memory would end

    @property
    def needs_captions(self) -> bool:
        templates = self.config.caption_templates
        return not templates or self.config.prior_path is not None or any("{caption}" in t for t in templates)

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        generator, text = networks["generator"], networks.get("text")
        lora.freeze(generator, config.frozen_weights or self.dtype, self.processes)
        checkpoint = None if self.resumed is None else self.checkpoints.stored(self.resumed)
        lora.adapt(generator, config.module_filters, config.lora_settings, checkpoint)
        if config.train_tokens:
            networks["tokens"] = lora.train_tokens(text, config.train_tokens)
            text.model.set_grad_checkpointing(config.activation_checkpointing > 0)
        if config.lora_checkpoint_path:
            lora.load_into(generator, networks.get("tokens"), config.lora_checkpoint_path, config.module_filters)
        return networks

    @property
    def features(self) -> dict[str, Feature]:
        features = super().features
        if self.config.train_tokens or self.config.caption_templates:  # texts differ from draw to draw
            features = {name: one for name, one in features.items() if name not in TEXT}
        return features | ({"latent_mask": Feature("encoder", PICTURE_SETTINGS)} if self.config.masked_loss else {})

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor]:
        features = super().picture_features(batch, random)
        mask = self.latent_mask(batch, features["latent"])
        return features if mask is None else features | {"latent_mask": mask}

    def latent_mask(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """How much each position of the latents is learnt (B, 1, h, w); None where all are alike."""
        if not self.config.masked_loss:
            return None
        mask = stored(batch, "latent_mask")
        if mask is None:
            mask = F.interpolate(batch.extra["mask"].float() / 255, latents.shape[2:], mode="area")
        return mask.float()

    def extra_fields(self) -> dict:
        return super().extra_fields() | sample_fields(self.config, from_cache=self.cache is not None)

    def prior(self, batch: Batch) -> list[bool]:
        """Which samples come from `prior_path`."""
        return batch.extra.get("prior", [False] * len(batch.keys))

    def captioned(self, batch: Batch, random: SampleRandom) -> Batch:
        """The batch with captions out of the templates."""
        templates = self.config.caption_templates
        return replace(batch, captions=choose_captions(batch.captions, self.prior(batch), templates, random))

    def texts_of(self, captions: list[tuple[str, str]]) -> list[str]:
        """What the text tower sees of (shard, caption) pairs."""
        prior = self.extra_fields().get("prior")
        return texts_read(captions, prior.shards if prior else (), self.config.caption_templates)

    def token_notes(self, texts: list[str], what: str) -> list[str]:
        """Which trained tokens stand in no text."""
        rows, entries = self.networks.get("tokens"), self.config.train_tokens or []
        return unused_tokens(self.networks["text"].tokenizer, entries, rows.tokens, texts, what) if rows else []

    def encode(self, batch: Batch, random: SampleRandom) -> Inputs:
        tokens = self.networks.get("tokens")
        # Gradients reach the tokens through the text tower; nothing else in here has any.
        with torch.set_grad_enabled(tokens is not None and tokens.training):
            latents, conditions = super().encode(self.captioned(batch, random), random)
        weights = [self.config.prior_weight if is_prior else 1.0 for is_prior in self.prior(batch)]
        return latents, conditions, self.latent_mask(batch, latents), to_device(torch.tensor(weights), self.device)

    def loss(self, inputs: Inputs, random: SampleRandom) -> Losses:
        latents, conditions, mask, weight = inputs
        losses = self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions), mask=mask)
        return replace(losses, loss=losses.loss * weight)

    def data_to_draw(self) -> list:
        """What the LoRA is about, not what it should not forget."""
        config = self.config
        prior = listed(config.prior_path)
        return [entry for entry in listed(config.webdataset_path) if entry not in prior]

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        return super().sample(held_out and self.captioned(held_out, SampleRandom(held_out.seeds)))

    def draw(self, prompts: list[str], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Drawings without and with the LoRA, from the same noise."""
        with ExitStack() as off:
            off.enter_context(without_adapters(self.networks["generator"]))
            if "tokens" in self.networks:
                off.enter_context(untrained(self.networks["tokens"]))
            base = super().draw(prompts, size)["sample"]
        return {"base": base, "LoRA": super().draw(prompts, size)["sample"]}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"lora": lora.lora_tensors(self.networks["generator"], self.networks.get("tokens"))}

    def file_metadata(self) -> dict[str, str]:
        config, networks = self.config, self.networks
        about = metadata(lora.lora_of(networks["generator"], networks.get("tokens")))
        return super().file_metadata() | about | {"module_filters": str(config.module_filters)}


if __name__ == "__main__":
    TrainLora.main()
