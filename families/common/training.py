"""What training scripts of diffusion models share: features, their caches, and the loss of a denoiser."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from families.common.beginning import check_start_file, same_base, with_first_defaults, with_target
from families.common.cache import Caches, Shape, command_for_another, find_caches
from families.common.cache_commands import cache_command
from families.common.cache_freshness import check_fresh
from families.common.cached_captions import TOKEN_IDS
from families.common.captions import cut_note, say_of_captions, undrawn
from families.common.config import DiffusionConfig
from families.common.features import Feature, Origin, lengths_name, stored
from families.common.losses import with_loss
from families.common.noise import training_draws, training_noise
from families.common.prompts import FILE_NAME, Encode, prompt_features, read_prompts
from families.common.sample_fields import SampleFields, resized
from families.common.sampling import check_sampling
from families.common.text_memory import TextMemory
from families.common.weight_files import AUTOENCODER, FAMILY_KEY, TARGET_KEY, TEXT, target_of
from families.common.weight_source import with_local_weights
from warpcore.config import ConfigError
from warpcore.core import Losses
from warpcore.data.joined import FurtherTars
from warpcore.data.reader import Batch
from warpcore.diffusion.diffusion import GDF
from warpcore.errors import UserError
from warpcore.idle_keys import about_idle
from warpcore.keys import weights_keys
from warpcore.random import SampleRandom

_KEYS = "keys"
"""Of what a run keeps: the keys of `first_defaults` that there were when it began."""


class DiffusionTraining(SampleFields):
    """Trains a denoiser of latents.

    What its frozen networks make of a sample, its features, may come from caches (`families/common/cache.py`); where
    they have all that is made of pictures, no pictures are read. Hooks to override: `make_diffusion`; for caches
    `features`, `encoders`, `picture_features`, `text_features`, `network_file`, and where wanted `feature_setting`,
    `check_cacheable` and `drawn_texts`.
    """

    config: DiffusionConfig
    start_files: ClassVar[tuple[str, ...]] = ("generator_checkpoint_path",)
    """Keys of the weights that a new run starts from; what they say of themselves has to fit the config."""
    start_keys: ClassVar[Sequence[str] | None] = None
    """The keys of the network about which they have to; by default all of `about_network`."""
    frozen_base: ClassVar[bool] = False
    """Whether the run only steers the network of `generator_checkpoint_path`, which has to stay the same."""

    family: ClassVar[str | None] = None
    """The name of its family, which exported files then say: needed where tensors do not tell it, as in a LoRA."""
    drawn_with: ClassVar[frozenset[str]] = frozenset()
    """Names of encoders that sample images need, whether or not a cache has their features."""
    default_target: ClassVar[str] = "epsilon"
    """`diffusion_target` where neither the config nor a file says one."""
    network_keys: ClassVar[Mapping[str, str]] = {"text": TEXT, "autoencoder": AUTOENCODER}
    """The config keys that name the weights of networks which make features."""
    conventions: ClassVar[Mapping[str, str]] = {"loss_weight": "converted"}
    """Ways to compute, as new runs have them. A run keeps its own when it is resumed, see `kept`."""
    first_conventions: ClassVar[Mapping[str, str]] = {"loss_weight": "as it is"}
    """Ways to compute of runs whose checkpoints don't name any."""

    # ------------------------------------------------------------------ hooks

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        """The diffusion process, for the `diffusion_target` and `offset_noise` of the config.

        convert_weight: a loss weight published for the error of another target is converted.
        """
        raise NotImplementedError

    def said_target(self) -> str | None:
        """What the weights to start from say that their network predicts, if they do."""
        return target_of(self.config.generator_checkpoint_path)

    def check_start(self) -> None:
        """Raise UserError where a new run's weights are of another network. Asked before what they say is compared."""

    @property
    def first_defaults(self) -> Mapping[str, Any]:
        """Keys that are newer than the first runs of this kind, with what those did. A run that began before a key
        goes on with that when it is resumed, unless its config names the key."""
        return {}

    @property
    def features(self) -> dict[str, Feature]:
        """What can be cached, by name."""
        raise NotImplementedError

    def read_shape(self, name: str) -> Shape | None:
        """The shape of a sample's feature that the trained network reads, None in it for a side of any size, such as
        (16, None, None); None where anything fits. A cache with another one is refused."""
        return None

    def check_cacheable(self) -> None:
        """Raise UserError where this configuration can't train without pictures, on cached features of them."""
        if self.config.bucketeer_random_ratio:
            raise ConfigError(
                "bucketeer_random_ratio draws another size for a picture in each epoch, but a cache holds one: set it "
                "to 0"
            )

    def network_file(self, network: str) -> Path:
        """The file of weights of a network that makes features. Raises UserError where it is missing."""
        raise NotImplementedError

    @classmethod
    def keys_of_network(cls, config: DiffusionConfig, network: str) -> tuple[str, ...]:
        """The config keys that name the weights of a network which makes features, its further parts included."""
        return (cls.network_keys[network],)

    def network_files(self, network: str) -> list[Path]:
        """The files, or folders of a library, with the weights of a network that makes features; none where the config
        names none: then a cache may be of any."""
        return [self.network_file(network)]

    def network_precision(self, network: str) -> str | None:
        """What a network that makes features is kept in, whatever `dtype` says; None where it follows that."""
        key = {"text": "text_encoder_precision"}.get(network, f"{network}_precision")
        return getattr(self.config, key, None)

    def feature_setting(self, name: str) -> Any:
        """A setting that features depend on."""
        return getattr(self.config, name, None)

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        """What builds the networks that make the features, with their weights, by name."""
        raise NotImplementedError

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor | Sequence[Tensor]]:
        """What the networks make of pictures: (B, ...), or a list of B, by name."""
        raise NotImplementedError

    def feature_decoder(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """What makes pictures (B, 3, H, W) in [0, 1] of their stored features (B, ...), to look at.

        Raises:
            UserError: the training stores nothing that a network of it makes pictures of.
        """
        if "autoencoder" not in self.encoders() or not {"moments", "latents"} & self.features.keys():
            raise UserError(f"nothing makes pictures of the features of this training: {', '.join(self.features)}")
        autoencoder = self.make_encoder("autoencoder").eval().to(self.device)

        def decode(features: Mapping[str, Tensor]) -> Tensor:
            moments = features.get("moments")
            latents = features["latents"] if moments is None else autoencoder.scale.latents(moments, None)
            return autoencoder.decode(latents)

        return decode

    def text_features(self, encoder: nn.Module, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder, `text` of the encoders, makes of captions: (B, ...) by name."""
        raise NotImplementedError

    @property
    def validation_levels(self) -> int:
        return self.config.validation_levels

    def around_forward(self, random: SampleRandom) -> AbstractContextManager:
        """What holds while the network predicts in `denoising_loss`."""
        return nullcontext()

    def with_further_losses(self, losses: Losses) -> Losses:
        """The losses of a batch, with those of what else is learned in that forward pass."""
        return losses

    def drawn_texts(self) -> list[str]:
        """The texts whose conditions a run needs beside those of its captions."""
        return list(dict.fromkeys(["", *getattr(self.config, "sample_prompts", [])]))

    # ------------------------------------------------------------------

    def __init__(self, config: DiffusionConfig):
        # A text encoder that is only on the hub may have nothing to do; then it is never downloaded.
        super().__init__(with_local_weights(config, {*weights_keys(type(config))} - {self.network_keys.get("text")}))
        self.kept = dict(self.conventions)
        self.older: list[str] = []  # what to tell of keys that are newer than the run
        self.idle: list[str] = []  # of keys that have no effect beside what files say

    def settle_features(self, about: Mapping[str, Any] | None) -> None:
        """Settle what features depend on where the config is silent; may replace `config`.

        about: what the checkpoint of a resumed run says of itself.
        """

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        about = None
        if saved is None:
            self.check_start()
        else:
            about, self.kept = saved.get("about", {}), dict(self.first_conventions) | saved.get("kept", {})
        self.settle_features(about)
        before = about_idle(self.config, self.config.model_fields_set)
        self.config = config = with_target(self.config, about, self.said_target(), self.default_target)
        self.idle = [line for line in about_idle(config, config.model_fields_set) if line not in before]
        if saved is None:
            self.kept[_KEYS] = sorted(self.first_defaults)
            about_network = config.about_network if self.start_keys is None else self.start_keys
            for key in self.start_files:
                check_start_file(config, key, about_network)
        newer = {key: value for key, value in self.first_defaults.items() if key not in self.kept.get(_KEYS, ())}
        config, self.older = with_first_defaults(config, newer)
        self.config = config
        if self.frozen_base:
            before = self.kept.get("base")
            base = self.processes.on_main(lambda: same_base(config.generator_checkpoint_path, before))
            self.kept["base"] = base or before
        diffusion = self.make_diffusion(
            "adaptive" if config.adaptive_loss_weight else config.loss_weight,
            convert_weight=self.kept["loss_weight"] == self.conventions["loss_weight"],
        )
        check_sampling(diffusion, config.sample_steps, config.sample_sampler)  # now, not at the first save
        self.diffusion = with_loss(diffusion, config, config.diffusion_target)
        self.bookkeeping["diffusion"] = self.diffusion

    @cached_property
    def caches(self) -> Caches | None:
        """The caches that features are read from; None where all are computed from pictures and captions."""
        return self.processes.on_main(lambda: find_caches(self))

    def is_cached(self, name: str) -> bool:
        """Whether a feature is read from a cache."""
        return self.caches is not None and name in self.caches

    def needed_encoders(self) -> dict[str, nn.Module]:
        """The encoders that have something to do: a cache spares the run those whose features it has."""
        return {name: self.make_encoder(name) for name in self.encoders() if self.needs_encoder(name)}

    def make_encoder(self, name: str) -> nn.Module:
        """An encoder with its weights; what is only on the hub is downloaded."""
        self._bring_weights(name)
        return self.encoders()[name]()

    def local_files(self, network: str) -> list[Path]:
        """`network_files`, after what is only on the hub was downloaded."""
        self._bring_weights(network)
        return self.network_files(network)

    def _bring_weights(self, network: str) -> None:
        self.config = with_local_weights(self.config, [self.network_keys.get(network)])

    def needs_encoder(self, name: str) -> bool:
        """Whether the run has to build an encoder."""
        made = self._made_by(name)
        return name in self.drawn_with or not made or not all(map(self.is_cached, made))

    def _made_by(self, network: str) -> list[str]:
        return [name for name, feature in self.features.items() if feature.network == network]

    @cached_property
    def texts(self) -> TextMemory | None:
        """What remembers the text conditions of captions, if anything does."""
        computed = self.caches is None or not all(map(self.is_cached, self._made_by("text")))
        if computed and not self.config.cache_text:
            return None
        limit_bytes = int(self.config.cache_text_gb * 1e9)
        disk = f"store them on disk: {cache_command(self, 'TEXTS', 'texts')}, and write caches: [TEXTS]"
        memory = TextMemory(self.encode_texts, limit_bytes, lambda text: self.progress.say(text), disk)
        if not self.needs_encoder("text"):
            texts = self.drawn_texts()
            memory.add(texts, self.processes.on_main(lambda: self.prompt_features(texts)))
        return memory

    def texts_made_with(self, origin: Origin) -> dict[str, str]:
        """What text conditions depend on beside the text, given what their cache was made with."""
        about = origin.networks["text"]
        made_with = {"sha256": about["sha256"], "token_ids": str(origin.settings.get(TOKEN_IDS))}
        return made_with | ({"precision": about["precision"]} if "precision" in about else {})

    def prompt_features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder makes of `drawn_texts`, where captions come from a cache: stored there, or encoded."""
        feature = self._made_by("text")[0]
        origin = self.caches.origins[feature]
        made_with = self.texts_made_with(origin)

        def open_encoder() -> Encode:
            tower = self.make_encoder("text").eval().requires_grad_(False).to(self.device, self.dtype)
            if self.caches.not_compared:
                find_caches(self)  # now that its weights are here
            for note in cut_note(tower, texts[1:], "sample_prompts"):
                self.progress.say(note)

            def encode(captions: Sequence[str]) -> dict[str, Tensor]:
                with torch.no_grad(), self.autocast():
                    return self.text_features(tower, captions)

            return encode

        known = read_prompts(self.caches.folders[feature], made_with)
        file = self.config.run_folder / FILE_NAME
        return prompt_features(file, texts, made_with | {"dtype": str(self.dtype)}, open_encoder, known)

    def held_out(self) -> Batch | None:
        batch = super().held_out()
        if batch is not None and self.texts is not None:  # captions are drawn with the conditions that a cache has
            names = [key for name in self._made_by("text") for key in (name, lengths_name(name))]
            if found := {name: value for name in names if (value := stored(batch, name)) is not None}:
                self.texts.add(batch.captions, found)
        return batch

    def setup(self) -> None:
        super().setup()
        for note in [*self.older, *self.idle, *undrawn(self.config)]:
            self.progress.say(note)
        if self.caches is not None:
            for note in [*self.caches.not_compared, *self.processes.on_main(self._check_fresh)]:
                self.progress.say(note)
            _ = self.texts  # encodes what the caches lack, before the first update
            if computed := [name for name in self.features if not self.is_cached(name)]:
                self.progress.say(f"no cache has {', '.join(computed)}: computed for each batch")
        say_of_captions(self)

    def _check_fresh(self) -> list[str]:
        """Compare the caches with their data, and with each other; what to tell of those that can't be compared."""
        catalogs = {"webdataset_path": self.feed.catalog, "validation_path": self.feed.validation_catalog}
        made_from = self.caches.made_from.items()
        notes = (check_fresh(catalogs[key], folders, getattr(self.config, key)) for key, folders in made_from)
        return list(chain.from_iterable(notes))

    @property
    def needs_images(self) -> bool:
        return not any(self.is_cached(name) for name, feature in self.features.items() if feature.of_picture)

    def extra_fields(self) -> dict:
        cached = {} if self.caches is None else self.caches.fields()
        return cached | self.sample_fields(from_cache=not self.needs_images)

    def geometry_remedy(self) -> str:
        cached = next((name for name, one in self.features.items() if one.of_picture and self.is_cached(name)), None)
        if cached is None:
            return super().geometry_remedy()
        folder, origin = self.caches.folders[cached], self.caches.origins[cached]
        return f"make another cache: {command_for_another(self, folder, origin)}"

    def further_tars(self) -> Mapping[str, Sequence[FurtherTars]]:
        return {} if self.caches is None else self.caches.further

    def caption_features(self, batch: Batch) -> dict[str, Tensor]:
        """What the text encoders make of the captions of a batch: (B, ...) by name."""
        made, wanted = self.encode_texts(batch.captions), {key for n in self.features for key in (n, lengths_name(n))}
        return {name: values for name, values in made.items() if name in wanted}

    def text_conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders make of captions, now or earlier."""
        return self.encode_texts(captions) if self.texts is None else self.texts.conditions(captions, self.device)

    def encode_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder makes of captions: (B, ...) by name."""
        return self.text_features(self.networks["text"], captions)

    def denoising_loss(
        self,
        latents: Tensor,
        random: SampleRandom,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor | None = None,
        shift: float | Tensor = 1.0,
        noised: Tensor | None = None,
    ) -> Losses:
        """The loss of predicting the target of noised latents, with the mask and the weights of the batch's samples.

        Args:
            latents: (B, C, *positions), such as (B, C, H, W) or (B, C, T, H, W).
            predict: the network: noised latents (like the latents) and noise conditions (B,) -> predictions.
            noise: like the latents; without it independent normal numbers, or multi-resolution noise.
            shift: in addition to the config's; (B,) of each sample.
            noised: broadcasts to the latents, false for parts that are given (`GDF.given`): these are not learned.
        """
        config, shape, shift = self.config, latents.shape[1:], shift * self.config.shift
        noise = training_noise(random, shape, config) if noise is None else noise
        diffused = self.diffusion.diffuse(latents, noise, shift=shift, **training_draws(random, shape, config))
        mask = None if self.mask is None else resized(self.mask, latents)
        if noised is not None:
            diffused = diffused._replace(noised=torch.where(noised, diffused.noised, self.diffusion.given(diffused)))
            mask = noised.float() if mask is None else mask * noised
        with self.around_forward(random):
            prediction = predict(diffused.noised, diffused.noise_cond)
        loss, raw, logsnr = self.diffusion.loss(diffused, prediction, mask)
        loss = loss if self.sample_weight is None else loss * self.sample_weight
        losses = Losses(loss, raw, {"logsnr": logsnr, "raw": raw} if self.diffusion.state_dict() else {})
        return self.with_further_losses(losses)

    def file_metadata(self) -> dict[str, str]:
        about = {key: str(getattr(self.config, key)) for key in (TARGET_KEY, *self.config.about_network)}
        return about | ({FAMILY_KEY: self.family} if self.family else {})

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.diffusion.update_buckets(statistics["logsnr"], statistics["raw"])
