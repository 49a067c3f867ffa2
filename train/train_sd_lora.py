"""Teach Stable Diffusion 1.5 or SDXL a subject or a style with a small LoRA and, if wanted, tokens of its own.

    python3 train/train_sd_lora.py configs/training/finetune_sd15_lora.yaml
    python3 train/train_sd_lora.py configs/training/finetune_sdxl_lora.yaml

The networks are frozen. The run's folder gets `lora.safetensors`, which holds the adapters of the U-Net, those of the
text encoders, and the tokens; tools/export.py writes it for diffusers and for kohya's scripts, A1111 and ComfyUI.
"""

import warpcore.openmp
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from families.common.captions import unused_tokens
from families.common.library_files import CONFIG_KEY
from families.common.lora import add_adapters
from families.common.lora_files import metadata
from families.common.lora_formats import Lora
from families.common.lora_training import DrawnWithoutLora, freeze, lora_of, lora_tensors, start_from, train_tokens
from families.stable_diffusion.lora import encoders_by_name, networks_by_name, read_lora
from families.stable_diffusion.lora_config import SdLoraConfig
from modules.lora import without_adapters
from modules.rank_by_noise import follow_noise
from modules.tokens import TokenRows, untrained
from train.train_sd import TrainSd

TOKENS = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}
"""What the rows of the tokens are called among the run's networks, by their text encoder."""


class TrainSdLora(DrawnWithoutLora, TrainSd):
    Config = SdLoraConfig
    start_files = ("generator_checkpoint_path", "lora_checkpoint_path")

    def __init__(self, config: SdLoraConfig):
        super().__init__(config)
        self.trainable = {"generator": {}}
        if config.text_encoder_filters:
            self.trainable["text"] = {"lr_scale": (config.text_encoder_lr or config.lr) / config.lr}
        if config.train_tokens:
            count = max(len(config.version.text), 1)
            self.trainable |= {name: {"lr_scale": config.token_lr_scale} for name in [*TOKENS.values()][:count]}
        if self.texts_learn:
            self.texts = None  # what captions mean changes, with gradients that a memory would end

    @property
    def texts_learn(self) -> bool:
        return len(self.trainable) > 1

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        freeze(networks["generator"], config, self.dtype, self.processes)
        add_adapters(networks["generator"], config.module_filters, config.lora_settings)
        follow_noise(networks["generator"], self.diffusion.noise_cond.level)
        if self.texts_learn:
            for name, encoder in encoders_by_name(networks["text"]).items():
                if config.text_encoder_filters:
                    at_any_noise = replace(config.lora_settings, min_rank=None)
                    add_adapters(encoder.model, config.text_encoder_filters, at_any_noise)
                if config.train_tokens:
                    networks[TOKENS[name]] = train_tokens(encoder, config.train_tokens)
        if config.lora_checkpoint_path:
            adapted = self.adapted(networks)
            found = read_lora(config.lora_checkpoint_path, adapted, config.model_version)
            for name, network in adapted.items():
                start_from(found.get(name, Lora({})), network, self.rows(name, networks), config.lora_checkpoint_path)
        return networks

    def adapted(self, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The networks that may have adapters, by the names of a pipeline."""
        if not self.texts_learn:
            return {"unet": networks["generator"]}
        return networks_by_name(networks["generator"], networks["text"])

    def rows(self, name: str, networks: dict[str, nn.Module]) -> TokenRows | None:
        """The tokens of a text encoder, by the name of a pipeline."""
        return networks.get(TOKENS.get(name))

    def token_notes(self, texts: list[str], what: str) -> list[str]:
        """Which trained tokens stand in no text."""
        rows, entries = self.networks.get("tokens"), self.config.train_tokens or []
        tokenizer = self.networks["text"].encoders[0].tokenizer if rows else None
        return unused_tokens(tokenizer, entries, rows.tokens, texts, what) if rows else []

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        with ExitStack() as off:
            for name, network in self.adapted(self.networks).items():
                off.enter_context(without_adapters(network))
                if (rows := self.rows(name, self.networks)) is not None:
                    off.enter_context(untrained(rows))
            yield

    def weights(self) -> dict[str, dict[str, Tensor]]:
        adapted = self.adapted(self.networks).items()
        own = {name: lora_tensors(network, self.rows(name, self.networks)) for name, network in adapted}
        return {"lora": {f"{name}.{tensor}": t for name, tensors in own.items() for tensor, t in tensors.items()}}

    def file_metadata(self) -> dict[str, str]:
        adapted = self.adapted(self.networks).items()
        about = metadata({name: lora_of(network, self.rows(name, self.networks)) for name, network in adapted})
        return {key: value for key, value in super().file_metadata().items() if key != CONFIG_KEY} | about


if __name__ == "__main__":
    TrainSdLora.main()
