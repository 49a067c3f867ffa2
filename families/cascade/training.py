"""What training scripts of this family share: the diffusion process, and the loss of a denoiser."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from families.cascade import build
from families.cascade.beginning import CONVENTIONS, FIRST_CONVENTIONS, check_start_file, same_base, with_target
from families.cascade.conditions import TEXT, text_conditions
from families.cascade.config import DiffusionConfig, FamilySettings
from families.cascade.diffusion import make_diffusion
from families.common.cache import find_cache
from families.common.cached_captions import TOKEN_IDS
from families.common.captions import cut_note, say_of_captions
from families.common.features import Feature, Origin, stored
from families.common.prompts import FILE_NAME, prompt_features
from families.common.text_memory import TextConditions, TextMemory
from warpcore.config import ConfigError
from warpcore.core import Losses, WarpCore
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


class CascadeTraining(WarpCore):
    """Trains a network on pictures whose sides the encoder of the family divides."""

    config: FamilySettings

    @property
    def bucket_factor(self) -> int:
        return self.config.version.bucket_factor


class DiffusionTraining(CascadeTraining):
    """Trains a denoiser of latents.

    What its frozen networks make of a sample, its features, may come from a cache (`families/common/cache.py`); then
    no pictures are read. Hooks to override for that: `features`, `encoders`, `picture_features`, `check_cacheable`.
    """

    config: DiffusionConfig
    start_files: ClassVar[tuple[str, ...]] = ("generator_checkpoint_path",)
    """Keys of the weights that a new run starts from; what they say of themselves has to fit the config."""
    frozen_base: ClassVar[bool] = False
    """Whether the run only steers the network of `generator_checkpoint_path`, which has to stay the same."""

    # ------------------------------------------------------------------ hooks

    @property
    def features(self) -> dict[str, Feature]:
        """What can be cached, by name."""
        raise NotImplementedError

    def check_cacheable(self) -> None:
        """Raise UserError where this configuration can't train from a cache."""
        if self.config.bucketeer_random_ratio:
            raise ConfigError(
                "bucketeer_random_ratio draws another size for a picture in each epoch, but a cache holds one: set it "
                "to 0"
            )

    def network_file(self, network: str) -> Path:
        """The weights of a network that makes features."""
        return build.network_file(self.config, network)

    def feature_setting(self, name: str) -> Any:
        """A setting that features depend on."""
        if name == TOKEN_IDS:
            return build.text_tokenizer(self.config, self.kept["tokenizer"]).name
        return getattr(self.config, name, None)

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        """What builds the networks that make the features, with their weights, by name."""
        raise NotImplementedError

    drawn_with: ClassVar[frozenset[str]] = frozenset()
    """Those of them that sample images need, whether or not a cache has their features."""

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor | Sequence[Tensor]]:
        """What the networks make of pictures: (B, ...), or a list of B, by name."""
        raise NotImplementedError

    # ------------------------------------------------------------------

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.kept = dict(CONVENTIONS)

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        about = None
        if saved is not None:
            about, self.kept = saved.get("about", {}), FIRST_CONVENTIONS | saved.get("kept", {})
        self.config = config = with_target(self.config, about)
        if saved is None:
            for key in self.start_files:
                check_start_file(config, key)
        if self.frozen_base:
            before = self.kept.get("base")
            base = self.processes.on_main(lambda: same_base(config.generator_checkpoint_path, before))
            self.kept["base"] = base or before
        self.diffusion = make_diffusion(
            config.diffusion_target,
            "adaptive" if config.adaptive_loss_weight else config.loss_weight,
            config.offset_noise,
            convert_weight=self.kept["loss_weight"] == CONVENTIONS["loss_weight"],
        )
        self.bookkeeping["diffusion"] = self.diffusion

    @cached_property
    def cache(self) -> Origin | None:
        """What the cache was made with that the data are read from; None where they are pictures."""
        return self.processes.on_main(lambda: find_cache(self))

    def needed_encoders(self) -> dict[str, nn.Module]:
        """The encoders that have something to do: a cache spares the run those whose features it has."""
        return {name: make() for name, make in self.encoders().items() if self.needs_encoder(name)}

    def needs_encoder(self, name: str) -> bool:
        """Whether the run has to build an encoder."""
        cached = {feature.network for feature in self.features.values()} if self.cache is not None else set()
        return name not in cached or name in self.drawn_with

    @cached_property
    def texts(self) -> TextMemory | None:
        """What remembers the text conditions of captions, if anything does."""
        if not self.config.cache_text and self.cache is None:
            return None
        limit_bytes = int(self.config.cache_text_gb * 1e9)
        memory = TextMemory(self.encode_texts, limit_bytes, lambda text: self.progress.say(text))
        if not self.needs_encoder("text"):
            texts = list(dict.fromkeys(["", *getattr(self.config, "sample_prompts", [])]))
            memory.add(texts, self.processes.on_main(lambda: self._prompt_features(texts)))
        return memory

    def _prompt_features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        made_with = {
            "sha256": self.cache.networks["text"]["sha256"],
            "token_ids": str(self.cache.settings.get(TOKEN_IDS)),
            "dtype": str(self.dtype),
        }

        def open_encoder() -> TextConditions:
            tower = self.encoders()["text"]().eval().requires_grad_(False).to(self.device, self.dtype)
            for note in cut_note(tower.tokenizer, tower.length, texts[1:], "sample_prompts"):
                self.progress.say(note)

            def encode(captions: Sequence[str]) -> dict[str, Tensor]:
                with torch.no_grad(), self.autocast():
                    return text_conditions(tower, captions, self.device)

            return encode

        return prompt_features(self.config.run_folder / FILE_NAME, texts, made_with, open_encoder)

    def know_captions(self, batch: Batch) -> None:
        """Remember the text conditions that a batch brings along from a cache, for drawing with its captions."""
        found = {name: value for name in TEXT if (value := stored(batch, name)) is not None}
        if found and self.texts is not None:
            self.texts.add(batch.captions, found)

    def setup(self) -> None:
        super().setup()
        if self.cache is not None:
            _ = self.texts  # encodes what the cache lacks, before the first update
        say_of_captions(self)

    @property
    def needs_images(self) -> bool:
        return self.cache is None

    def extra_fields(self) -> dict:
        return {} if self.cache is None else self.cache.fields(self.features)

    def caption_features(self, batch: Batch) -> dict[str, Tensor]:
        """What the text tower makes of captions: (B, ...) by name."""
        made = self.encode_texts(batch.captions)
        return {name: made[name] for name in TEXT if name in self.features}

    def text_conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text tower makes of captions, now or earlier."""
        return self.encode_texts(captions) if self.texts is None else self.texts.conditions(captions, self.device)

    def encode_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return text_conditions(self.networks["text"], captions, self.device)

    def denoising_loss(
        self,
        latents: Tensor,
        random: SampleRandom,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Losses:
        """The loss of predicting the target of noised latents.

        Args:
            latents: (B, C, *positions), such as (B, C, H, W) or (B, C, T, H, W).
            predict: the network: noised latents (like the latents) and noise conditions (B,) -> predictions.
            noise: like the latents; independent normal numbers without it.
            mask: (B, 1, *positions), how much each position counts; all alike without it.
        """
        noise = random.normal("noise", *latents.shape[1:]) if noise is None else noise
        each_channel = (latents.shape[1], *(1 for _ in latents.shape[2:]))
        offset = random.normal("offset noise", *each_channel) if self.config.offset_noise else None
        diffused = self.diffusion.diffuse(
            latents, noise, random.uniform("timestep"), offset=offset, shift=self.config.shift
        )
        loss, raw, logsnr = self.diffusion.loss(diffused, predict(diffused.noised, diffused.noise_cond), mask)
        return Losses(loss, raw, {"logsnr": logsnr, "raw": raw} if self.diffusion.state_dict() else {})

    def file_metadata(self) -> dict[str, str]:
        return {"diffusion_target": self.config.diffusion_target, "model_version": self.config.model_version}

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.diffusion.update_buckets(statistics["logsnr"], statistics["raw"])


def per_sample(values: Tensor) -> Tensor:
    """The means (B,) of (B, ...)."""
    return values.flatten(1).mean(dim=1)
