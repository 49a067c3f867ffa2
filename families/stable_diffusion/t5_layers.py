"""Texts by T5 in place of CLIP: states of T5, brought by a linear layer to the width that the U-Net reads.

1.5     Linear 4096 -> 768 of each state, times a scale; zeros after the last token
SDXL    Linear 4096 -> 2048 of each state, padding included, and as pooled text Linear 4096 -> 1280 of their mean,
        padding included
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from families.common.library_files import CONFIG, FILE_NAMES
from families.common.t5 import T5TextEncoder
from families.common.text_conditions import LibraryTextEncoder, TextConditions, Tokens
from warpcore.random import stable_hash

MAX_TOKENS = 512
"""Tokens that T5 reads of a text at most; what it was trained with."""


class Projection(nn.Linear):
    """A linear layer of states (..., D), times a scale, in files as diffusers has layers."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, scale: float = 1.0):
        super().__init__(inputs, outputs, bias)
        self.scale = scale

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) of states."""
        return super().forward(states) * self.scale

    @torch.no_grad()
    def draw(self, name: str) -> None:
        """Fixed random weights, which keep the size of states, and no bias.

        name: layers of other names get other numbers.
        """
        generator = torch.Generator().manual_seed(stable_hash("projection", name, *self.weight.shape))
        drawn = torch.randn(self.weight.shape, generator=generator)
        self.weight.copy_(drawn / math.sqrt(self.in_features))
        self.bias.zero_()

    def save_pretrained(self, folder: Path) -> None:
        """Write its config and weights."""
        folder.mkdir(parents=True)
        about = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        content = json.dumps(about | {"scaling_factor": self.scale}, indent=2)
        (folder / CONFIG).write_text(f"{content}\n", encoding="utf-8")
        save_file(self.state_dict(), folder / f"{FILE_NAMES[0]}.safetensors", {"format": "pt"})


class T5Texts(LibraryTextEncoder):
    """T5 and the layers behind it, frozen: conditions (B, L, D), and with a `pooled` layer (B, P).

    Args:
        t5: it reads `MAX_TOKENS`; with `pooled` L, padded.
        text: makes (B, L, D) of its states.
        pooled: SDXL's: makes (B, P) of the mean of its states.
        length: L.
    """

    encoders = ()
    """Of the CLIP text encoders, which LoRAs and tokens are for, there are none."""

    def __init__(self, t5: T5TextEncoder, text: Projection, pooled: Projection | None, length: int):
        super().__init__()
        self.t5, self.text, self.pooled, self._length = t5, text, pooled, length
        self.tokenizer, self.key = t5.tokenizer, t5.key
        self.requires_grad_(False)

    @property
    def length(self) -> int:
        """L."""
        return self._length

    def tokenize(self, texts: list[str]) -> Tokens:
        """The tokens that T5 reads."""
        return self.t5.tokenize(texts)

    def encode(self, tokens: Tokens) -> TextConditions:
        """The conditions of tokens, in float32."""
        made = self.t5.encode(tokens)
        with self.in_own_precision():
            states = made.hidden.float()
            hidden = self.text(states)
            if self.pooled is not None:
                return TextConditions(hidden, self.pooled(states.mean(dim=1)), made.mask)
        # Longer texts are cut after T5 has read them, shorter ones padded after the layer.
        rows = self.length - states.shape[1]
        return TextConditions(F.pad(hidden * made.mask[..., None], (0, 0, 0, rows)), None, F.pad(made.mask, (0, rows)))
