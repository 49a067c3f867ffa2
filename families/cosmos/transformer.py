"""diffusers' CosmosTransformer3DModel on pictures. Imported where it is built: it imports diffusers."""

import diffusers
from torch import Tensor

from families.cosmos import original_names


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
