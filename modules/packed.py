"""Linear layers whose frozen matrices are kept in fewer bits than they compute in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Packing = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""`stored` and `scale` of a matrix, float32 (C_out, C_in), and of the dtype that a layer computes in."""


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is `stored` (C_out, C_in) in eight bits times `scale` (C_out,).

    A layer becomes one by changing its class, see `keep_packed`. It computes in the dtype of `scale`.
    """

    stored: nn.Parameter
    scale: Tensor

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), unpacked; changing it changes nothing."""
        return unpacked(self.stored, self.scale)

    @classmethod
    def takes(cls, weight: Tensor) -> bool:
        """Whether a matrix (C_out, C_in) can be packed."""
        return True


def unpacked(stored: Tensor, scale: Tensor) -> Tensor:
    """(C_out, C_in) in the dtype of `scale` (C_out,)."""
    return stored.to(scale.dtype) * scale[:, None]


@torch.no_grad()
def keep_packed(network: nn.Module, kind: type[PackedLinear], pack: Packing, device: torch.device | str) -> None:
    """Make linear layers `kind`, one by one on `device`, frozen; others stay as they are."""
    for layer in network.modules():
        if type(layer) is not nn.Linear or not kind.takes(layer.weight):
            continue
        weight = layer._parameters.pop("weight").to(device)
        stored, scale = pack(weight.float(), weight.dtype)
        layer.__class__ = kind
        layer.stored = nn.Parameter(stored, requires_grad=False)
        layer.register_buffer("scale", scale)
