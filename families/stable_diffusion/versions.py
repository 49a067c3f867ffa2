"""Constructor numbers of the published networks and of the mini, for files that don't say them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.common.autoencoders import SD_AUTOENCODER
from families.common.t5 import T5_XXL_NAME
from families.common.text_encoders import LAST, PENULTIMATE, HiddenState

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""

TIME_IDS = "text_time"
"""`addition_embed_type` of U-Nets that are told pooled texts and sizes."""
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77,
    "bos_token_id": 49406, "eos_token_id": 49407, "architectures": ["CLIPTextModel"],
}  # fmt: skip
CLIP_BIG_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu", "architectures": ["CLIPTextModelWithProjection"],
}  # fmt: skip
"""The second text encoder of SDXL, whose texts are padded with `!` (id 0)."""
TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
"""What messages call the published versions."""


@dataclass(frozen=True)
class Version:
    """One size of Stable Diffusion."""

    unet: dict[str, Any]
    """Constructor numbers of diffusers' UNet2DConditionModel."""
    text: tuple[dict[str, Any], ...]
    """Configs of transformers' text encoders."""
    padding: tuple[str, ...]
    """What the tokenizer of each pads with."""
    hidden: HiddenState
    """Which of their hidden states are the condition."""
    autoencoder: dict[str, Any]
    """Constructor numbers of diffusers' AutoencoderKL."""
    autoencoder_file: Path | None = None
    """Where it is by default."""
    text_file: Path | None = None
    """Where the text encoder is by default."""
    t5: Path = Path(T5_XXL_NAME)
    """Where T5 is by default, for `text_model: t5`."""
    latent_factor: int = 8
    """Sides of latents are multiples of this: 64 px, as is customary. Its U-Net needs one for each halving."""

    @property
    def sees_sizes(self) -> bool:
        """Whether the U-Net is told pooled texts, and the true size and the crop of pictures: SDXL's."""
        return self.unet.get("addition_embed_type") == TIME_IDS


VERSIONS = {
    "sd15": Version(
        unet={"sample_size": 64, "cross_attention_dim": 768},
        text=(CLIP_L,),
        padding=("<|endoftext|>",),
        hidden=LAST,
        autoencoder=SD_AUTOENCODER | {"scaling_factor": 0.18215, "sample_size": 512, "force_upcast": False},
    ),
    "sdxl": Version(
        unet={
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text=(CLIP_L, CLIP_BIG_G),
        padding=("<|endoftext|>", "!"),
        hidden=PENULTIMATE,
        autoencoder=SD_AUTOENCODER | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    ),
    "mini": Version(
        unet={
            "sample_size": 8, "in_channels": 16, "out_channels": 16, "block_out_channels": [64, 96],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1,
            "cross_attention_dim": 64, "attention_head_dim": 4, "norm_num_groups": 16,
        },
        text=(),
        padding=(),
        hidden=LAST,
        autoencoder={},
        autoencoder_file=MINI / "autoencoder.safetensors",
        text_file=MINI / "text_tower.safetensors",
        t5=MINI / "t5.safetensors",
        latent_factor=2,
    ),
}  # fmt: skip
