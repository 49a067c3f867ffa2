"""What the training scripts of the cascade share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from families.cascade import build
from families.cascade.conditions import text_conditions
from families.cascade.config import CascadeConfig, FamilySettings
from families.cascade.diffusion import make_diffusion
from families.common.cache import Shape
from families.common.cached_captions import TOKEN_IDS
from families.common.training import DiffusionTraining
from families.common.weight_source import with_local_weights
from modules.clip import TextTower
from warpcore.core import WarpCore
from warpcore.diffusion.diffusion import GDF
from warpcore.errors import UserError


class CascadeTraining(WarpCore):
    """Trains a network on pictures whose sides the encoder of the family divides."""

    config: FamilySettings

    def __init__(self, config: FamilySettings):
        super().__init__(with_local_weights(config))

    @property
    def bucket_factor(self) -> int:
        return self.config.version.bucket_factor


class DenoiserTraining(CascadeTraining, DiffusionTraining):
    """Trains Stage B or Stage C, or what steers it."""

    config: CascadeConfig
    network_keys = {
        "text": "clip_text_checkpoint_path", "image": "clip_image_checkpoint_path",
        "encoder": "effnet_checkpoint_path", "stage_a": "stage_a_checkpoint_path",
    }  # fmt: skip
    conventions = DiffusionTraining.conventions | {"tokenizer": "clip"}
    first_conventions = DiffusionTraining.first_conventions | {"tokenizer": "open_clip"}

    def make_diffusion(self, loss_weight: str, convert_weight: bool) -> GDF:
        return make_diffusion(self.config.diffusion_target, loss_weight, self.config.offset_noise, convert_weight)

    def network_file(self, network: str) -> Path:
        return build.network_file(self.config, network)

    def feature_setting(self, name: str) -> Any:
        if name == TOKEN_IDS:
            return build.text_tokenizer(self.config, self.kept["tokenizer"]).name
        return super().feature_setting(name)

    def read_shape(self, name: str) -> Shape | None:
        widths = self.config.version.stage_c
        return (None, widths.get("c_clip_text", 1280)) if name == "clip_text" else None

    def feature_decoder(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        if "stage_a" in self.features:
            stage_a = build.stage_a(self.config).eval().to(self.device)
            return lambda features: stage_a.decode(features["stage_a"].float())
        if "latent" not in self.features or not build.has_previewer(self.config):
            file = build.previewer_file(self.config)
            raise UserError(f"of Stage C's latents a previewer makes pictures: {file} (previewer_checkpoint_path)")
        previewer = build.previewer(self.config).eval().to(self.device)
        return lambda features: previewer(features["latent"].float())

    def text_features(self, encoder: TextTower, captions: Sequence[str]) -> dict[str, Tensor]:
        return text_conditions(encoder, captions, self.device)
