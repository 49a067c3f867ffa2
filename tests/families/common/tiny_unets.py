"""Tiny U-Nets of diffusers with the layouts of Stable Diffusion 1.5 and SDXL, and inputs for them."""

import torch
from diffusers import UNet2DConditionModel

SD15 = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "cross_attention_dim": 12,
}  # fmt: skip
SDXL = SD15 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 58,
}  # fmt: skip


def unet(config: dict, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval()


def inputs(config: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """x, times and the conditions by our names."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "x": torch.randn(2, 4, 8, 8, generator=generator), "times": torch.tensor([3.0, 700.5]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
    }  # fmt: skip
    if config.get("addition_embed_type"):
        found |= {"text_embeds": torch.randn(2, 10, generator=generator),
                  "time_ids": torch.tensor([[64.0, 48, 0, 8, 64, 64], [32, 32, 0, 0, 64, 64]])}  # fmt: skip
    return found


def library_call(network: UNet2DConditionModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output as plain diffusers gives it."""
    added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    return network(
        given["x"], given["times"], given["encoder_hidden_states"], added_cond_kwargs=added or None, return_dict=False
    )[0]
