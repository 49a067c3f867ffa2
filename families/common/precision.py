"""The precision of a frozen network, which is its own: it follows neither the run's dtype nor its autocast."""

from contextlib import AbstractContextManager
from typing import Literal, Self

import torch
from torch import nn

from modules.autocast import without_autocast
from modules.float8 import FORMATS, keep_in_float8
from modules.float8_product import CAPABILITY, DTYPE, SIDES, Float8ProductLinear
from modules.int8 import SIDES as INT8_SIDES
from modules.int8 import keep_in_int8
from modules.packed import PackedLinear
from modules.quantise import quantise
from warpcore.errors import UserError
from warpcore.loading import load_deferred

Precision = Literal["float32", "bfloat16", "float16", "nf4"]
"""How a frozen network is kept; `nf4` in four bits (QLoRA, arXiv:2305.14314), computing in bfloat16."""
BasePrecision = Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8", "int8", "int8_rotated", "nf4"]
"""How a frozen network is kept that adapters change; `float8` and the int8 ones multiply in eight bits, other packed
ones compute in bfloat16."""
PACKED = frozenset({*FORMATS, "float8", "int8", "int8_rotated", "nf4"})


def freeze(
    network: nn.Module,
    precision: Precision | BasePrecision | torch.dtype,
    key: str,
    device: torch.device | str = "cpu",
    computes_on: torch.device | str | None = None,
) -> None:
    """Freeze a network in a precision.

    Args:
        key: the config key that chose the precision, which an error names.
        device: where its matrices go, one by one, to be packed into eight or four bits.
        computes_on: where the network will compute, if that is another device.

    Raises:
        UserError: `nf4` without torchao, or eight bits in which the device, or no layer at all, can compute.
    """
    network.requires_grad_(False)
    packed = precision in PACKED
    dtype = torch.bfloat16 if packed else precision
    # Not the network's own `to`: diffusers' warns of every change of dtype.
    nn.Module.to(network, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if not packed:
        return
    load_deferred(network, "cpu")
    if precision != "nf4":
        computes_on = torch.device(computes_on or device)
        if computes_on.type == "mps":
            raise UserError(f"{key}: MPS has no {precision}; write bfloat16 or nf4")
        if precision in FORMATS:
            keep_in_float8(network, FORMATS[precision], device)
        elif precision == "float8":
            _check_float8(key, computes_on)
            keep_in_float8(network, DTYPE, device, Float8ProductLinear)
            _check_packed(network, key, precision, SIDES, "int8")
        else:
            keep_in_int8(network, device, rotate=precision == "int8_rotated")
            _check_packed(network, key, precision, INT8_SIDES, "float8_e4m3fn or bfloat16")
        return
    try:
        quantise(network, device)
    except ImportError as error:
        raise UserError(f"{key}: nf4 needs torchao: pip install torchao") from error


def _check_float8(key: str, device: torch.device) -> None:
    """Raise UserError where a GPU does not multiply in float8. CPUs do it, slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"{key}: float8 needs a GPU that multiplies in fp8 (Ada, Hopper or later), not "
            f"{torch.cuda.get_device_name(device)}; write int8"
        )


def _check_packed(network: nn.Module, key: str, kind: str, sides: int, instead: str) -> None:
    """Raise UserError where no layer of a network was packed, as GPUs would not multiply its matrices."""
    if not any(isinstance(layer, PackedLinear) for layer in network.modules()):
        raise UserError(f"{key}: no linear layer has sides that {sides} divides, as {kind} needs; write {instead}")


class FrozenNetwork(nn.Module):
    """A frozen network that moves between devices but keeps its precision: `to(torch.bfloat16)` does not change it."""

    def to(self, *args, **kwargs) -> Self:
        device, _, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        kept = {} if memory_format is None else {"memory_format": memory_format}
        return super().to(device=device, non_blocking=non_blocking, **kept)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def in_own_precision(self) -> AbstractContextManager:
        """Inside, the run's autocast does not apply."""
        return without_autocast(self.device)
