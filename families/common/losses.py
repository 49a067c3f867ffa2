"""The loss and the noise of training that a config asks for, in every training script of a diffusion model."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from warpcore.config import Settings, Share
from warpcore.diffusion.huber import PseudoHuber
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS, loss_weight_for
from warpcore.idle_keys import Need

if TYPE_CHECKING:
    from warpcore.diffusion.diffusion import GDF


class LossSettings(Settings):
    """The error that is minimised, and the noise that is added."""

    needs = {
        **dict.fromkeys(
            ("huber_c", "huber_schedule"),
            Need("loss_type: huber or smooth_l1", lambda config: config.loss_type != "l2"),
        ),
        "multires_noise_iterations": Need("a number above 1", lambda config: config.multires_noise_iterations > 1),
        "multires_noise_discount": Need(
            "multires_noise_iterations above 1", lambda config: config.multires_noise_iterations > 1
        ),
    }

    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "p2"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    adaptive_loss_weight: bool = False
    """The published name of `loss_weight: adaptive`: divide the loss by its own running mean at each noise level."""
    min_snr_gamma: PositiveFloat | None = None
    """`loss_weight: min_snr` with another bound than 5 (arXiv:2303.09556): min(SNR, gamma) / SNR for noise, over SNR +
    1 for v, over (sqrt(SNR) + 1)^2 for a straight flow. The paper takes 5; 1 evens out more."""
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """What is minimised of an error e: its square, 2 c (sqrt(e^2 + c^2) - c), or that over c, with c from `huber_c`
    (pseudo-Huber, arXiv:2403.16728): pictures that don't fit the others count less. `raw_loss` stays the square."""
    huber_c: PositiveFloat = 0.1
    """The size of the error from which `huber` and `smooth_l1` grow linearly; 0.1 is usual."""
    huber_schedule: Literal["snr", "constant"] = "snr"
    """Whether that size is `huber_c` at every noise level, or close to 1 where there is little noise and falls to
    `huber_c` (`snr`)."""
    offset_noise: NonNegativeFloat = 0.0
    """Strength of noise that shifts whole channels; helps with very dark and very bright pictures (0.05 to 0.1)."""
    multires_noise_iterations: Annotated[int, Field(ge=0, le=100)] = 0
    """Levels of multi-resolution noise (Whitaker's pyramid noise), which does what `offset_noise` does for coarse
    structures of every size; 6 to 10 are usual, 0 and 1 leave plain noise."""
    multires_noise_discount: Share = 0.3
    """How much weaker each coarser level of that noise is; 0.1 to 0.3 are usual, 0.8 is strong."""
    input_perturbation: NonNegativeFloat = 0.0
    """Strength of further noise that only the network's input has, not its target (arXiv:2301.11706, which takes 0.1):
    the network learns to correct its own errors in sampling."""

    @model_validator(mode="after")
    def _agreeing(self) -> Self:
        usual = type(self).model_fields["loss_weight"].default
        if self.adaptive_loss_weight and self.loss_weight not in (usual, "adaptive"):
            raise ValueError(f"adaptive_loss_weight contradicts loss_weight: {self.loss_weight}; remove one")
        if self.min_snr_gamma is not None and (
            self.adaptive_loss_weight or self.loss_weight not in (usual, "min_snr")
        ):
            other = "adaptive_loss_weight" if self.adaptive_loss_weight else f"loss_weight: {self.loss_weight}"
            raise ValueError(f"min_snr_gamma contradicts {other}; remove one")
        if self.offset_noise and self.multires_noise_iterations:
            raise ValueError("offset_noise and multires_noise_iterations exclude each other; remove one")
        return self


def with_loss(diffusion: "GDF", settings: LossSettings, target: str) -> "GDF":
    """The diffusion process with the error and the loss weight of the settings.

    Raises:
        UserError: the loss weight makes no sense for the target (`diffusion_target`).
    """
    if settings.min_snr_gamma is not None:
        zero = diffusion.schedule.zero_terminal_snr
        gamma = settings.min_snr_gamma
        diffusion.loss_weight = loss_weight_for("min_snr", target, zero_terminal_snr=zero, max_snr=gamma)
    if settings.loss_type != "l2":
        smooth = settings.loss_type == "smooth_l1"
        diffusion.error = PseudoHuber(settings.huber_c, settings.huber_schedule, smooth)
    return diffusion
