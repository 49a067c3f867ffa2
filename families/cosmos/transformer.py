"""diffusers' CosmosTransformer3DModel on pictures. Imported where it is built: it imports diffusers."""

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import Tensor, nn

from families.common.library_networks import adapt
from families.cosmos import original_names

TOKEN_ARGUMENTS = {"image_rotary_emb": 0, "extra_pos_emb": 1}
"""Of a block: see `warpcore.networks.HasTokens`."""


class CosmosTransformer3DModel(diffusers.CosmosTransformer3DModel):
    """The library's network, which takes latents of pictures (B, C, H, W) as well as of videos (B, C, T, H, W)."""

    published_layer = staticmethod(original_names.published_layer)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        return_dict: bool = True,
    ):
        """The velocity epsilon - x0, like the latents.

        Args:
            hidden_states: (1 - t) x0 + t epsilon.
            timestep: t (B,), from 0 (clean) to 1 (noise).
            encoder_hidden_states: text (B, L, D). It has no mask: padding is rows of zeros, as many as in training.
            padding_mask: (1, 1, H, W), 1 where latents are no part of the picture; without it, all are.
        """
        picture = hidden_states.dim() == 4
        latents = hidden_states[:, :, None] if picture else hidden_states
        if padding_mask is None:
            padding_mask = latents.new_zeros(1, 1, *latents.shape[-2:])
        made = super().forward(
            latents, timestep, encoder_hidden_states, padding_mask=padding_mask, return_dict=return_dict
        )
        if not picture:
            return made
        return (made[0][:, :, 0],) if not return_dict else type(made)(sample=made.sample[:, :, 0])


class PositionsPerSample(CosmosAttnProcessor2_0):
    """The library's self-attention, whose rotary positions (N, D) all samples share, or those of each, (B, N, D)."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if image_rotary_emb is None or image_rotary_emb[0].dim() == 2:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        layers = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in layers)
        cos, sin = (part[:, None] for part in image_rotary_emb)  # (B, 1, N, D)
        q, k = (rotated(norm(x), cos, sin) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](made))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, H, N, D) turned by their positions; the two numbers of a pair are D / 2 apart."""
    first, second = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1).float() * sin).to(x.dtype)


def adapted(network: CosmosTransformer3DModel) -> nn.Module:
    """The network as the engine wants it."""
    for block in network.transformer_blocks:
        block.attn1.set_processor(PositionsPerSample())
    return adapt(network, token_arguments=TOKEN_ARGUMENTS)
