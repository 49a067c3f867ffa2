"""diffusers' PixArtTransformer2DModel as the engine calls it. Imported where it is built: it imports diffusers."""

import math
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from modules.dit import PatchEmbedding, grid_positions


class PlacedPatches(PatchEmbedding):
    """Latents (B, C, H, W) -> tokens (B, N, D) with the sines of their places, computed for any size.

    Args:
        base: patches per side of the size that the network was made for: places of other sizes are scaled to it.
        scale: places are divided by it, too.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int, base: int, scale: float):
        super().__init__(patch_size, in_channels, hidden_size)
        self.patch_size, self.width, self.base, self.scale = patch_size, hidden_size, base, scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x)
        return tokens + self.positions([side // self.patch_size for side in x.shape[-2:]], x.device).to(tokens.dtype)

    def positions(self, grid: list[int], device: torch.device | None = None) -> Tensor:
        """(1, N, D) float32 of a grid of patches (rows, columns)."""
        return grid_positions(grid, self.width, device, [self.base / side / self.scale for side in grid])


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel):
    """The library's network, with conditions by name, and with the buffer of the published files that the library
    leaves out: `y_embedding` (L, D), the network's own empty text.

    Args:
        text_length: L; None for weights without an empty text of their own, such as those in a folder of diffusers.
        numbers: of the library's constructor.
    """

    def __init__(self, text_length: int | None = None, **numbers: Any):
        super().__init__(**numbers)
        config = self.config
        scale = config.interpolation_scale
        self.pos_embed = PlacedPatches(
            config.patch_size, config.in_channels, self.inner_dim, config.sample_size // config.patch_size,
            max(config.sample_size // 64, 1) if scale is None else scale,
        )  # fmt: skip
        empty = None if text_length is None else torch.randn(text_length, config.caption_channels)
        self.register_buffer("y_embedding", None if empty is None else empty / math.sqrt(config.caption_channels))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        return_dict: bool = True,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ):
        """The noise in latents (B, C, H, W), and their variance between its bounds: (B, 2C, H, W).

        Args:
            timestep: (B,) below 1,000.
            encoder_hidden_states: text (B, L, D).
            encoder_attention_mask: (B, L), true for its tokens.
            resolution: (B, 2) height and width of the picture in px; of networks of 1024-MS alone.
            aspect_ratio: (B, 1) height divided by width; likewise.
            added_cond_kwargs: the two before, as pipelines of the library give them.
        """
        if self.use_additional_conditions and added_cond_kwargs is None:
            added_cond_kwargs = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, added_cond_kwargs,
            encoder_attention_mask=encoder_attention_mask, return_dict=return_dict,
        )  # fmt: skip


def initialise(name: str, layer: nn.Module) -> None:
    """Random weights as the published program has them: linear layers Xavier, those of embeddings normal with
    deviation 0.02, and zero what leads out of the cross attentions and out of the network."""
    if isinstance(layer, PixArtTransformer2DModel) and layer.y_embedding is not None:
        nn.init.normal_(layer.y_embedding, std=layer.y_embedding.shape[1] ** -0.5)
    if (table := dict(layer.named_parameters(recurse=False)).get("scale_shift_table")) is not None:
        nn.init.normal_(table, std=table.shape[1] ** -0.5)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return
    nn.init.zeros_(layer.bias)
    if name == "proj_out" or name.endswith("attn2.to_out.0"):
        nn.init.zeros_(layer.weight)
    elif name.startswith(("adaln_single.", "caption_projection.")):
        nn.init.normal_(layer.weight, std=0.02)
    else:
        nn.init.xavier_uniform_(layer.weight.flatten(1))
