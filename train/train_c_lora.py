"""Teach Stage C a subject or a style with a small LoRA and, if wanted, tokens of its own.

python3 train/train_c_lora.py configs/training/quickstart_lora.yaml
python3 train/train_c_lora.py configs/training/finetune_c_3b_lora.yaml

Stage C is frozen. The run's folder gets `lora.safetensors`, which holds the adapters and the tokens.
"""

import warpcore.openmp
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from families.cascade import lora
from families.cascade.lora_config import LoraConfig
from families.cascade.lora_formats import metadata
from families.common import lora_training
from families.common.captions import unused_tokens
from modules.lora import without_adapters
from modules.rank_by_noise import follow_noise
from modules.tokens import untrained
from train.train_c import TrainStageC
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class TrainLora(lora_training.DrawnWithoutLora, TrainStageC):
    Config = LoraConfig
    start_files = ("generator_checkpoint_path", "lora_checkpoint_path")

    def __init__(self, config: LoraConfig):
        super().__init__(config)
        self.trainable = {"generator": {}}
        if config.train_tokens:
            self.trainable["tokens"] = {"lr_scale": config.token_lr_scale}
            self.texts = None  # what captions say changes with the tokens, whose gradient a memory would end

    @property
    def captions_vary(self) -> bool:
        return bool(self.config.train_tokens) or super().captions_vary

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        generator, text = networks["generator"], networks.get("text")
        lora_training.freeze(generator, config, self.dtype, self.processes)
        checkpoint = self.origin and self.origin.checkpoints.stored(self.origin.update)
        lora.adapt(generator, config.module_filters, config.lora_settings, checkpoint)
        follow_noise(generator, self.diffusion.noise_cond.level)
        if config.train_tokens:
            networks["tokens"] = lora_training.train_tokens(text, config.train_tokens)
            text.model.set_grad_checkpointing(config.activation_checkpointing > 0)
        if config.lora_checkpoint_path:
            lora.load_into(generator, networks.get("tokens"), config.lora_checkpoint_path, config.module_filters)
        return networks

    def token_notes(self, texts: list[str], what: str) -> list[str]:
        """Which trained tokens stand in no text."""
        rows, entries = self.networks.get("tokens"), self.config.train_tokens or []
        return unused_tokens(self.networks["text"].tokenizer, entries, rows.tokens, texts, what) if rows else []

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.networks.get("tokens")
        # Gradients reach the tokens through the text tower; nothing else in here has any.
        with torch.set_grad_enabled(tokens is not None and tokens.training):
            return super().encode(batch, random)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        with ExitStack() as off:
            off.enter_context(without_adapters(self.networks["generator"]))
            if "tokens" in self.networks:
                off.enter_context(untrained(self.networks["tokens"]))
            yield

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"lora": lora_training.lora_tensors(self.networks["generator"], self.networks.get("tokens"))}

    def file_metadata(self) -> dict[str, str]:
        config, networks = self.config, self.networks
        about = metadata(lora_training.lora_of(networks["generator"], networks.get("tokens")))
        return super().file_metadata() | about | {"module_filters": str(config.module_filters)}


if __name__ == "__main__":
    TrainLora.main()
