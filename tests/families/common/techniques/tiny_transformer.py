"""A transformer of a few blocks with tokens (B, N, C), a condition (B, C), and biases (N, C) and (B, N, C)."""

import torch
from torch import Tensor, nn

from modules.blocks import Block, set_activation_checkpointing


class TinyBlock(Block):
    wide = True

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def compute(self, x: Tensor, condition: Tensor, shared: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        y = self.norm(x) + shared + own[0] * own[1]
        return x + self.attention(y, y, y, need_weights=False)[0] + self.inner(y).tanh() * condition[:, None]


class TinyTransformer(nn.Module):
    """Blocks over the tokens of x (B, N, C), then a linear layer."""

    token_arguments = {"shared": 0, "own": 1}

    def __init__(self, depth: int = 5, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.token_width = width
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(depth))
        self.last = nn.Linear(width, width)

    def set_activation_checkpointing(self, level: int) -> None:
        set_activation_checkpointing(list(self.blocks), level)

    def forward(self, x: Tensor, condition: Tensor, shared: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, shared, own)
        return self.last(x)


def tiny_inputs(batch: int = 3, tokens: int = 10, width: int = 8) -> dict:
    torch.manual_seed(1)
    x, *own = torch.randn(3, batch, tokens, width)
    condition, shared = torch.randn(batch, width), torch.randn(tokens, width)
    return {"x": x, "condition": condition, "shared": shared, "own": tuple(own)}
