"""Tiny pipelines of Stable Diffusion 1.5 and SDXL as diffusers writes them: random weights, the published layouts.

The U-Nets have the published numbers of levels and blocks, so tensors have their published names; channels and widths
are small. A pipeline takes a second to make, once per process and kind, and 64 x 64 px become 8 x 8 latents.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import diffusers
import open_clip
import torch
from transformers import CLIPTokenizer

from tests.families.common.tiny_clip import write_encoder, write_tokenizer

Vocabulary = Literal["letters", "clip"]
"""Each letter a token (small files), or that of the public CLIP models, which readers of single files assume."""
SD15_UNET = {
    "sample_size": 8, "block_out_channels": (8, 12, 16, 16), "layers_per_block": 2, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 2, "cross_attention_dim": 16,
}  # fmt: skip
SDXL_UNET = {
    "sample_size": 8, "block_out_channels": (8, 12, 16), "layers_per_block": 2, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 2, 2), "use_linear_projection": True,
    "cross_attention_dim": 16 + 24, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
AUTOENCODER = {
    "block_out_channels": (4, 8, 12, 12), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 64,
}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def write_sd15(folder: Path, vocabulary: Vocabulary = "letters", **scheduler) -> Path:
    """A pipeline of Stable Diffusion 1.5 in `folder`, which is returned: CLIP of width 16, PNDM.

    scheduler: further settings of it, such as `prediction_type`.
    """
    return _copy(_made_sd15(vocabulary, **scheduler), folder)


def write_sdxl(folder: Path, vocabulary: Vocabulary = "letters", **scheduler) -> Path:
    """A pipeline of SDXL in `folder`, which is returned: encoders of widths 16 and 24 (pooled: 20), Euler."""
    return _copy(_made_sdxl(vocabulary, **scheduler), folder)


def _copy(made: tempfile.TemporaryDirectory, folder: Path) -> Path:
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    return folder


@cache
def _made_sd15(vocabulary: Vocabulary, **scheduler) -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory()
    tokenizer = _write_tokenizer(Path(made.name, "tokenizer"), vocabulary)
    diffusers.StableDiffusionPipeline(
        unet=_unet(SD15_UNET),
        vae=_autoencoder(scaling_factor=0.18215, force_upcast=False),
        text_encoder=write_encoder(Path(made.name, "text_encoder"), tokenizer, seed=1),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(made.name)
    return made


@cache
def _made_sdxl(vocabulary: Vocabulary, **scheduler) -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    tokenizers = [_write_tokenizer(folder / f"tokenizer{end}", vocabulary, pad) for end, pad in SDXL_PADDING.items()]
    diffusers.StableDiffusionXLPipeline(
        unet=_unet(SDXL_UNET),
        vae=_autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=write_encoder(folder / "text_encoder", tokenizers[0], seed=1),
        text_encoder_2=write_encoder(folder / "text_encoder_2", tokenizers[1], seed=2, width=24, projection=20),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", **scheduler),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return made


SDXL_PADDING = {"": "<|endoftext|>", "_2": "!"}
"""What its two tokenizers pad with, by the ending of their folders."""


def _unet(config: dict) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**config).eval()


def _autoencoder(**config) -> diffusers.AutoencoderKL:
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(**AUTOENCODER, **config).eval()


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    if vocabulary == "letters":
        return write_tokenizer(folder, pad)
    pairs = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(token, token): i for token, i in pairs.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=ids, merges=list(pairs.bpe_ranks), pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer
