"""What gives the training script of a diffusion transformer the keys `repa` and `tread`, and what they do.

A script's config inherits `TechniqueSettings`; its class names `TransformerTechniques` before the family's training
class, and its `build` calls `with_techniques`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families.common.features import PICTURE_SETTINGS, Feature, stored
from families.common.library_files import CONFIG
from families.common.patch_encoders import PatchEncoder, patch_encoder, patch_width
from families.common.sample_fields import resized
from families.common.techniques.config import TechniqueSettings
from families.common.techniques.repa import HiddenTokens, Projector, alignment
from families.common.techniques.tread import TokenRouting, take_tokens
from families.common.training import DiffusionTraining
from families.common.weight_source import local_weights
from warpcore.core import Losses
from warpcore.data.reader import Batch
from warpcore.meta import are_only_shapes
from warpcore.random import SampleRandom
from warpcore.results import per_sample

ENCODER, PROJECTOR, PATCHES, TOKEN_PX = "repa", "repa_projector", "patches", "token_px"
"""Names of the frozen image encoder, of the trained projector, of what the encoder makes of a picture, and of the
setting that says how many pixels a token and side has."""
ENCODER_KEY = "repa.encoder"


class TransformerTechniques(DiffusionTraining):
    """Hooks of a training script for `TechniqueSettings`."""

    config: TechniqueSettings
    patches: Tensor | None = None
    """What the frozen image encoder makes of the current batch (B, N, D)."""
    _computed: tuple[Tensor, Tensor] | None = None
    """Pictures, and their patches."""
    _hidden: HiddenTokens | None = None
    _routing: TokenRouting | None = None

    def __init__(self, config: TechniqueSettings):
        super().__init__(config)
        if self.config.repa is not None:
            self.trainable = {**self.trainable, PROJECTOR: {}}

    @property
    def token_px(self) -> int:
        """Pixels per token and side."""
        return self.bucket_factor

    def with_techniques(self, network: nn.Module) -> dict[str, nn.Module]:
        """The network to train, `generator`, and what techniques train beside it, by name.

        Raises:
            UserError: the network is none for the techniques that the config asks for.
        """
        repa, tread = self.config.repa, self.config.tread
        self._routing = None if tread is None else TokenRouting(network, tread)
        if repa is None:
            return {"generator": network}
        self._hidden = HiddenTokens(network, repa, self._routing)
        with torch.device("meta" if are_only_shapes() else "cpu"):
            width = patch_width(self._encoder_path, ENCODER_KEY)
            return {"generator": network, PROJECTOR: Projector(network.token_width, repa.projector_width, width)}

    @contextmanager
    def around_forward(self, random: SampleRandom) -> Iterator[None]:
        with ExitStack() as used:
            if self._routing is not None:
                used.enter_context(self._routing.drawn(random))
            if self._hidden is not None:
                used.enter_context(self._hidden.taken())
            yield

    def with_further_losses(self, losses: Losses) -> Losses:
        if self._hidden is None:
            return losses
        aligned = self._alignment(*self._hidden.release())
        counted = aligned if self.sample_weight is None else aligned * self.sample_weight
        loss = losses.loss + self.config.repa.weight * counted
        return replace(losses, loss=loss, metrics=losses.metrics | {"alignment": aligned})

    def _alignment(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        """The alignment (B,) of the tokens of the last forward pass; a mask counts as in the loss."""
        patches, counts = self.patches, None
        if self.mask is not None:
            counts = resized(self.mask, self.mask.new_empty(1, 1, *self._grid)).flatten(1)  # (B, N)
        if places is not None:
            patches = take_tokens(patches, places)
            counts = None if counts is None else counts.gather(1, places)
        aligned = alignment(self.networks[PROJECTOR](tokens), patches)
        if counts is None:
            return per_sample(aligned)
        return per_sample(aligned * counts) / per_sample(counts).clamp(min=1e-6)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: tensors for name, tensors in super().weights().items() if name != PROJECTOR}

    # ------------------------------------------------------------------ the patches, a feature of a picture

    @cached_property
    def _encoder_path(self) -> Path:
        named = self.config.repa.encoder
        return named if are_only_shapes() else local_weights(named, ENCODER_KEY)

    def encoders(self) -> dict[str, Callable[[], nn.Module]]:
        return super().encoders() | ({ENCODER: self._patch_encoder} if self.config.repa else {})

    def _patch_encoder(self) -> PatchEncoder:
        return patch_encoder(self._encoder_path, ENCODER_KEY)

    def network_files(self, network: str) -> list[Path]:
        if network != ENCODER:
            return super().network_files(network)
        path = self._encoder_path
        return [file for file in (path, path / CONFIG) if file == path or file.is_file()]

    @property
    def features(self) -> dict[str, Feature]:
        own = {PATCHES: Feature(ENCODER, (*PICTURE_SETTINGS, TOKEN_PX))} if self.config.repa else {}
        return super().features | own

    def feature_setting(self, name: str) -> Any:
        return self.token_px if name == TOKEN_PX else super().feature_setting(name)

    def picture_features(self, batch: Batch, random: SampleRandom) -> dict[str, Tensor | Sequence[Tensor]]:
        made = super().picture_features(batch, random)
        return made | {PATCHES: self._patches_of(batch)} if self.config.repa else made

    def _patches_of(self, batch: Batch) -> Tensor:
        """(B, N, D) float32 of a batch of pictures, computed once: what asks for latents gets all features."""
        if self._computed is None or self._computed[0] is not batch.images:
            self._computed = batch.images, self.networks[ENCODER](batch.images, self._grid_of(batch))
        return self._computed[1]

    def _grid_of(self, batch: Batch) -> tuple[int, int]:
        """(rows, columns) of the tokens of a picture."""
        return batch.size[0] // self.token_px, batch.size[1] // self.token_px

    def encoded(self, batch: Batch) -> tuple[Any, SampleRandom]:
        if self.config.repa:
            self._grid, self.patches = self._grid_of(batch), stored(batch, PATCHES)
            if self.patches is None:
                with torch.no_grad():
                    self.patches = self._patches_of(batch)
        return super().encoded(batch)
