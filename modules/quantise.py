"""Frozen weights in four bits: NF4 of QLoRA (arXiv:2305.14314, section 3), as torchao implements it.

torchao's NF4 is plain PyTorch, so it runs (and is tested) wherever PyTorch does, where bitsandbytes brings compiled
kernels for each platform; and its backward pass keeps the four bits, where torchao's 8-bit weights are kept unpacked.
"""

import torch
from torch import nn

BLOCK = 64 * 256
"""torchao quantises 64 weights together, and the scales of 256 such blocks."""


@torch.no_grad()
def quantise(network: nn.Module, device: torch.device | str) -> None:
    """Put the matrices of linear layers and attention projections into NF4, one by one on `device`, frozen.

    Others, and matrices whose size NF4's blocks do not divide, stay as they are. A quantised layer computes in the
    dtype that its weights had. Raises ImportError without torchao.
    """
    from torchao.quantization import to_nf4

    for layer in network.modules():
        names = {"weight"} if type(layer) is nn.Linear else {"in_proj_weight"} & set(layer._parameters)
        for name in names:
            weight = getattr(layer, name)
            if weight.numel() % BLOCK == 0:
                setattr(layer, name, nn.Parameter(to_nf4(weight.to(device)), requires_grad=False))
