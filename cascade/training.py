"""What training scripts of this family share: the diffusion process, and the loss of a denoiser."""

from collections.abc import Callable

from torch import Tensor

from cascade.config import DiffusionConfig, FamilySettings
from cascade.diffusion import make_diffusion
from warpcore.core import Losses, WarpCore
from warpcore.random import SampleRandom


class CascadeTraining(WarpCore):
    """Trains a network on pictures whose sides the encoder of the family divides."""

    config: FamilySettings

    @property
    def bucket_factor(self) -> int:
        return self.config.version.bucket_factor


class DiffusionTraining(CascadeTraining):
    """Trains a denoiser of latents."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        loss_weight = "adaptive" if config.adaptive_loss_weight else config.loss_weight
        self.diffusion = make_diffusion(config.diffusion_target, loss_weight, config.offset_noise)
        self.bookkeeping["diffusion"] = self.diffusion

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
            latents: (B, C, H, W).
            predict: the network: noised latents (B, C, H, W) and noise conditions (B,) -> predictions (B, C, H, W).
            noise: like the latents; independent normal numbers without it.
            mask: (B, 1, H, W), how much each position counts; all alike without it.
        """
        noise = random.normal("noise", *latents.shape[1:]) if noise is None else noise
        offset = random.normal("offset noise", latents.shape[1], 1, 1) if self.config.offset_noise else None
        diffused = self.diffusion.diffuse(
            latents, noise, random.uniform("timestep"), offset=offset, shift=self.config.shift
        )
        squared = (predict(diffused.noised, diffused.noise_cond).float() - diffused.target).square()
        if mask is not None:  # normalised, so that a small masked area does not learn more slowly
            squared = squared * mask / mask.mean(dim=(2, 3), keepdim=True).clamp(min=1e-6)
        raw = squared.mean(dim=(1, 2, 3))
        statistics = {"logsnr": diffused.logsnr, "raw": raw} if self.diffusion.state_dict() else {}
        return Losses(raw * diffused.loss_weight, raw, statistics)

    def file_metadata(self) -> dict[str, str]:
        return {"diffusion_target": self.config.diffusion_target}

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.diffusion.update_buckets(statistics["logsnr"], statistics["raw"])


def per_sample(values: Tensor) -> Tensor:
    """The means (B,) of (B, ...)."""
    return values.flatten(1).mean(dim=1)
