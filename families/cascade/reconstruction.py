"""Pictures through Stage A alone, and through encoder, Stage B and Stage A, the way a drawn picture comes."""

from collections.abc import Sequence
from typing import Self

from pydantic import PositiveFloat, model_validator
from torch import Tensor

from families.cascade.inference import OF_STAGE_B, DrawingSettings
from families.cascade.sampling import Cascade
from families.common.pictures import pad
from families.common.reconstruction import ReconstructConfig, frame_by_frame
from families.common.sampling import latent_size
from warpcore.idle_keys import Need


class CascadeReconstructConfig(ReconstructConfig, DrawingSettings):
    """Keys of `inference/reconstruct.py` for the cascade; it needs nothing of Stage C."""

    unused = frozenset(
        {
            "generator_checkpoint_path",
            "previewer_checkpoint_path",
            "clip_image_model_name",
            "clip_image_checkpoint_path",
            "diffusion_target",
        }
    )

    needs = dict.fromkeys(
        (*OF_STAGE_B, "guidance_rescale", "compression", "caption", "seed", "effnet_checkpoint_path",
         "clip_text_model_name", "clip_text_checkpoint_path"),
        Need("stage_a_only: false", lambda config: not config.stage_a_only),
    )  # fmt: skip

    compression: PositiveFloat | None = None
    """Pixels per position of the encoder's latents; by default what Stage C's have (42.67, mini: 16)."""
    caption: str = ""
    """What Stage B reads beside the latents."""
    seed: int = 0
    """Of Stage B's noise."""
    stage_a_only: bool = False
    """Leave out encoder and Stage B."""

    @model_validator(mode="after")
    def _has_stage_b(self) -> Self:
        if not self.stage_a_only and self.stage_b.generator_checkpoint_path is None:
            raise ValueError("no weights of Stage B: give stage_b_checkpoint_path, or write stage_a_only: true")
        return self


class CascadeReconstruction:
    """Rebuilds with a cascade; see `families.common.reconstruction.Reconstruction`.

    What Stage A loses, no drawing will have; what the whole way loses beside it was not in the encoder's latents.
    """

    Config = CascadeReconstructConfig

    def __init__(self, config: CascadeReconstructConfig):
        self.config, self.cascade = config, Cascade(config)

    def rebuild(self, originals: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        return frame_by_frame(self._rebuild_pictures, originals)

    def _rebuild_pictures(self, pictures: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        rebuilt = {"Stage A": self.cascade.rebuild(pictures)}
        return rebuilt if self.config.stage_a_only else rebuilt | {"cascade": self._from_latents(pictures)}

    def notes(self) -> list[str]:
        return [self.cascade.peak_memory()]

    def _from_latents(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """What encoder, Stage B and Stage A make of pictures (3, H, W) in [0, 1]."""
        config, cascade, sizes = self.config, self.cascade, [tuple(picture.shape[1:]) for picture in pictures]
        compression = config.compression or config.version.compression
        whole = [pad(picture, cascade.picture_factor) for picture in pictures]
        latents = cascade.encode(whole, [latent_size(*picture.shape[1:], compression) for picture in whole])
        caption, nothing = cascade.read([config.caption, ""])["clip_text_pooled"].split(1)
        return cascade.decode(cascade.draw_b(latents, caption, nothing, sizes, [config.seed] * len(sizes)), sizes)
