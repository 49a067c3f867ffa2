"""A tiny Cosmos-Predict2 as diffusers writes it: random weights, 16 x 16 px are one token. And its published files."""

import json
from pathlib import Path

import diffusers
import torch

from families.cosmos.original_names import published_tensors
from tests.families.common.tiny_t5 import write_t5, write_tokenizer

TRANSFORMER = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
    "mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (128, 240, 240), "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 4.0, 4.0), "concat_padding_mask": True, "extra_pos_embed_type": None,
}  # fmt: skip


def transformer(seed: int = 0) -> diffusers.CosmosTransformer3DModel:
    torch.manual_seed(seed)
    return diffusers.CosmosTransformer3DModel(**TRANSFORMER)


def write_cosmos(folder: Path) -> Path:
    """A pipeline's folder, which is returned: transformer, vae, text_encoder, tokenizer."""
    transformer().save_pretrained(folder / "transformer")
    torch.manual_seed(1)
    diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(folder / "vae")
    write_t5(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos2TextToImagePipeline"}))
    return folder


def write_published(file: Path, network: torch.nn.Module, prefix: str = "net.", **more: torch.Tensor) -> Path:
    """A file of the published program, which is returned: a denoiser in bfloat16, with buffers."""
    tensors = published_tensors(network.state_dict(), network.config.attention_head_dim)
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    torch.save({prefix + name: tensor for name, tensor in weights.items()} | more, file)
    return file
