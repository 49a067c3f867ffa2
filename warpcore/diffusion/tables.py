"""Noise schedules of N discrete timesteps as tables, as Stable Diffusion, DiT and ADM are trained with.

A table starts as betas (N,), the variance of the noise that each timestep adds to the one before. From it follow
alphas_cumprod = (1 - betas).cumprod(0), the share of the signal in the variance of a noised sample (arXiv:2006.11239,
eq. 4), and SNR = alphas_cumprod / (1 - alphas_cumprod).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from warpcore.diffusion.schedules import Schedule
from warpcore.errors import UserError
from warpcore.transfer import to_device


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012, dtype=torch.float64) -> Tensor:
    """Stable Diffusion's betas (N,), whose square roots are linear (arXiv:2112.10752, configuration files)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02, dtype=torch.float64) -> Tensor:
    """The linear betas (N,) of DDPM, ADM and DiT (arXiv:2006.11239, section 4)."""
    return torch.linspace(start, end, steps, dtype=dtype)


def cosine_betas(steps: int, s: float = 0.008, largest: float = 0.999, dtype=torch.float64) -> Tensor:
    """The betas (N,) of the cosine schedule (arXiv:2102.09672, eq. 17), clipped at the end as published."""
    angle = (torch.linspace(0, 1, steps + 1, dtype=torch.float64) + s) / (1 + s) * math.pi / 2
    signal = angle.cos() ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=largest).to(dtype)


BETAS: dict[str, Callable[[int], Tensor]] = {
    "scaled_linear": scaled_linear_betas,
    "linear": linear_betas,
    "cosine": cosine_betas,
}


def with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (N,) whose last timestep is pure noise and whose first is as before (arXiv:2305.08891, algorithm 1)."""
    signal = (1 - betas).cumprod(0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alphas_cumprod = signal**2
    return betas_of(alphas_cumprod)


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """The betas (N,) of a table of alphas_cumprod (N,)."""
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def make_table(name: str = "scaled_linear", steps: int = 1000, *, zero_terminal_snr: bool = False) -> "TableSchedule":
    """The schedule of a name in `BETAS`, with its published range of betas.

    Raises:
        UserError: no schedule has this name.
    """
    if name not in BETAS:
        raise UserError(f"noise schedule: {name!r} is unknown; write one of {', '.join(BETAS)}")
    betas = BETAS[name](steps)
    if zero_terminal_snr:
        betas = with_zero_terminal_snr(betas)
    return TableSchedule((1 - betas).cumprod(0), steps_offset=int(name == "scaled_linear"))


class TableSchedule(Schedule):
    """Discrete timesteps from 0 (least noise) to N - 1, given by their alphas_cumprod (N,), which fall.

    It is called with whole numbers, which are timesteps, or with floats from 0 (timestep 0) to 1 (timestep N - 1),
    between which logSNR is linear. Below 0, as at timestep -1, is the clean signal. logSNR is -inf at a last timestep
    that is pure noise.

    Args:
        steps_offset: the last of leading timesteps in sampling: 1 for Stable Diffusion, 0 for ADM, DiT and PixArt.

    Attributes: `alphas_cumprod`, `betas`, `snr`, `logsnr`: (N,) float64, on the CPU.
    """

    def __init__(self, alphas_cumprod: Tensor, shift: float = 1.0, steps_offset: int = 1):
        table = alphas_cumprod.detach().cpu().double()
        if table.dim() != 1 or len(table) < 2 or not (table[-1] >= 0 and table[0] < 1 and (table.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must be a row of at least 2 numbers that fall, from below 1 to 0 or above"
            )
        self.alphas_cumprod = table
        self.steps_offset = steps_offset
        self.betas = betas_of(table)
        self.snr = table / (1 - table)
        self.logsnr = table.logit()
        self._logsnr_on = {self.logsnr.device: self.logsnr}
        super().__init__(shift=shift, force_limits=False)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        return self.alphas_cumprod[-1].item() == 0

    def __call__(self, t: Tensor, shift: float = 1.0) -> Tensor:
        """logSNR of `t`, both (B,): in the precision of a float `t`, else float64 on a CPU and float32 elsewhere."""
        table = self._table(t.device)
        position = t.to(table.dtype) * (self.steps - 1 if t.is_floating_point() else 1)
        before = position.floor().long().clamp(0, self.steps - 2)
        share = (position - before).clamp(max=1)
        low, high = table[before], table[before + 1]
        logsnr = torch.where(share == 1, high, torch.where(share == 0, low, torch.lerp(low, high, share)))
        logsnr = torch.where(t < 0, math.inf, logsnr - 2 * math.log(shift * self.shift))
        return logsnr.to(t.dtype) if t.is_floating_point() else logsnr

    def fraction(self, t: Tensor) -> Tensor:
        return t if t.is_floating_point() else t / (self.steps - 1)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """The timesteps, with fractions, at which the table has `logsnr`; both (B,). From 0 to N - 1."""
        noise = -self._table(logsnr.device)  # rises, as searchsorted wants
        wanted = -logsnr.to(noise.dtype)
        before = (torch.searchsorted(noise, wanted) - 1).clamp(0, self.steps - 2)
        low, high = noise[before], noise[before + 1]
        share = torch.where(wanted <= low, 0.0, ((wanted - low) / (high - low)).clamp(max=1))
        share = torch.where(wanted >= high, 1.0, share)  # the last may be infinite
        return (before + share).to(logsnr.dtype)

    def training_t(self, uniform: Tensor) -> Tensor:
        """(B,) int64: every timestep is as likely."""
        return (uniform * self.steps).long().clamp(max=self.steps - 1)

    def t_at(self, levels: Tensor) -> Tensor:
        return self.training_t(levels)

    def _table(self, device: torch.device) -> Tensor:
        """logSNR on a device, brought there once; in float32 off the CPU, since MPS has no float64."""
        if device not in self._logsnr_on:
            self._logsnr_on[device] = to_device(self.logsnr.float(), device)
        return self._logsnr_on[device]
