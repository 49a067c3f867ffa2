"""The networks of a family that is made up: convolutions for pictures, letters counted for texts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import blocks

COMPRESSION = 4
"""Pixels per position of the latents and side."""
LETTERS = 32


class Squeeze(nn.Module):
    """An autoencoder of two convolutions."""

    forward_methods = ("encode", "decode")

    def __init__(self, channels: int = 4):
        super().__init__()
        self.pack = nn.Conv2d(3, channels, COMPRESSION, COMPRESSION)
        self.unpack = nn.ConvTranspose2d(channels, 3, COMPRESSION, COMPRESSION)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1]."""
        return self.pack(pictures * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.unpack(latents).sigmoid()


class LetterCount(nn.Module):
    """A text encoder that knows how often each letter occurs, and neither tokens nor a longest text."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.mix = nn.Linear(LETTERS, width)

    def forward(self, texts: list[str]) -> Tensor:
        """(B, D)."""
        counts = torch.zeros(len(texts), LETTERS)
        for row, text in enumerate(texts):
            for letter in text.lower().encode():
                counts[row, letter % LETTERS] += 1
        return self.mix(counts.to(self.mix.weight))


class Puff(blocks.Block):
    wide = True

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.outer = nn.Conv2d(2 * width, width, 1)

    def compute(self, x: Tensor, hint: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(x + hint)))


class Cloud(nn.Module):
    """A denoiser of convolutions alone."""

    def __init__(self, width: int = 8, channels: int = 4, letters: int = 8, depth: int = 2):
        super().__init__()
        self.channels = channels
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.clock = nn.Conv2d(2, width, 1)
        self.words = nn.Conv2d(letters, width, 1)
        self.puffs = nn.ModuleList(Puff(width) for _ in range(depth))
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor, letters: Tensor) -> Tensor:
        """Predictions (B, C, h, w) of noised latents, at timesteps (B,) of 100, for letters (B, D)."""
        angle = times.to(x) / 100 * torch.pi
        clock = self.clock(torch.stack([angle.sin(), angle.cos()], dim=1)[..., None, None])
        hint, x = clock + self.words(letters.to(x)[..., None, None]), self.stem(x)
        for puff in self.puffs:
            x = puff(x, hint)
        return self.leave(x)

    @property
    def blocks(self) -> list[Puff]:
        return [*self.puffs]

    def set_activation_checkpointing(self, level: int) -> None:
        blocks.set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        blocks.compile_blocks(self.blocks, graphs)
