"""The wide layer pair of the convolution and feed-forward blocks, most of what an update costs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its energy over the picture, relative to the mean energy of the channels.

    ConvNeXt V2 (arXiv:2301.00808), equations 1 to 3, on (B, H, W, C). Starts as the identity.
    """

    def __init__(self, c: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, 1, 1, c))
        self.beta = nn.Parameter(torch.empty(1, 1, 1, c))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        energy = _norm_over_positions(x)
        response = energy / _mean_energy(energy)
        return torch.addcmul(self.beta, x, 1 + self.gamma * response).to(x.dtype)


class FeedForward(nn.Sequential):
    """(B, H, W, c_in) -> (B, H, W, c): a layer four times as wide, GELU, the global response norm, and back.

    With `fused`, GELU and norm are one function that keeps its input alone for the backward pass, in place of its
    input, its output and what lies between; `torch.compile` gets the plain layers, which it fuses itself.
    """

    fused = True

    def __init__(self, c_in: int, c: int, dropout: float):
        super().__init__(
            nn.Linear(c_in, c * 4), nn.GELU(), GlobalResponseNorm(c * 4), nn.Dropout(dropout), nn.Linear(c * 4, c)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused or torch.compiler.is_compiling():
            return super().forward(x)
        expand, _, norm, dropout, contract = self
        return contract(dropout(_GeluResponseNorm.apply(expand(x), norm.gamma, norm.beta)))


class _GeluResponseNorm(torch.autograd.Function):
    """The global response norm of gelu(x), x (B, H, W, C).

    With g = gelu(x), e the energies, m their mean and s = 1 + gamma e / m: y = s g + beta. The gradient with respect
    to g is s dy + g (de / e), where de is that with respect to the energies.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with without_autocast(x.device):  # which would make the wide tensors float32
            y = F.gelu(x)
            energy = _norm_over_positions(y)
            ctx.save_for_backward(x, gamma, energy)
            return torch.addcmul(beta, y, 1 + gamma * (energy / _mean_energy(energy)), out=y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gamma, energy = ctx.saved_tensors
        mean = _mean_energy(energy)
        response = energy / mean
        y = F.gelu(x)
        shared = (grad * y).sum(dim=(1, 2), keepdim=True, dtype=energy.dtype)
        grad_gamma = (shared * response).sum(dim=0, keepdim=True)
        grad_beta = grad.sum(dim=(0, 1, 2), keepdim=True, dtype=energy.dtype)
        grad_response = shared * gamma
        grad_energy = (grad_response - (grad_response * response).mean(dim=-1, keepdim=True)) / mean
        # A channel of zeros has no direction to grow in: its energy's gradient counts as 0.
        y.mul_(grad_energy / energy.clamp_min(1e-12))
        torch.addcmul(y, grad, 1 + gamma * response, out=y)
        return torch.ops.aten.gelu_backward(y, x), grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype)


def _mean_energy(energy: Tensor) -> Tensor:
    return energy.mean(dim=-1, keepdim=True) + 1e-6


def _norm_over_positions(x: Tensor) -> Tensor:
    """The Euclidean norm of each channel of (B, H, W, C) -> (B, 1, 1, C), in float32 at least; gradient 0 at 0."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    # On a CPU six times as fast as vector_norm over these axes.
    squares = x.square().sum(dim=(1, 2), keepdim=True)
    return squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
