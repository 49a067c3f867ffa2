"""What every sampler is: an object that makes one drawing, step by step."""

from collections.abc import Callable

from torch import Tensor

from warpcore.diffusion.scalers import Scaler

Noise = Callable[[], Tensor]


class Sampler:
    """One step from a noised sample to a less noisy one.

    It is made with the input scaler of the diffusion process, which gives the weights (a, b) of signal and noise.
    """

    needs_variance = False
    """Whether the denoiser must learn the variance of steps."""

    def __init__(self, scaler: Scaler):
        self.scaler = scaler

    def start(self, logsnrs: Tensor) -> list[int]:
        """Begin a drawing along `logsnrs` (steps + 1,); an earlier one is forgotten.

        Gives the indices of `logsnrs` in the order in which the network is asked, and the last one: a sampler that
        corrects a step asks at the end of it twice.
        """
        return list(range(len(logsnrs)))

    def step(
        self,
        x: Tensor,
        x0: Tensor,
        epsilon: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        *,
        noise: Noise | None = None,
        variance: Tensor | None = None,
    ) -> Tensor:
        """The sample (B, ...) at `logsnr_next`.

        Args:
            x: (B, ...) the noised sample, with logSNR `logsnr` (B,).
            x0, epsilon: the signal and noise that the denoiser finds in it.
            logsnr_next: (B,) wanted logSNR of the result.
            noise: gives standard normal draws like x; only called by a sampler that is random.
            variance: like x, what the denoiser says of the variance of the step; see `LearnedRange`.
        """
        raise NotImplementedError

    def _draw(self, noise: Noise | None) -> Tensor:
        if noise is None:
            raise ValueError(f"{type(self).__name__} is random: pass `noise`, which gives its normal draws")
        return noise()
