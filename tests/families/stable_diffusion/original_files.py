"""Single files in the layout of the original programs, made of a pipeline's folder without this project's code.

U-Net and autoencoder are renamed by the golden manifests; text encoders by their notes.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden import load_manifest

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors",
}  # fmt: skip


def component_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a pipeline's networks, as diffusers and transformers wrote them."""
    return {
        name: load_file(folder / name / file) for name, file in WEIGHTS.items() if (folder / name / file).is_file()
    }


def original_file(folder: Path) -> dict[str, Tensor]:
    """The tensors of a single file with the networks of a tiny pipeline in `folder`."""
    parts = component_tensors(folder)
    sdxl = "text_encoder_2" in parts
    text = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    clip = parts["text_encoder"]
    tensors = renamed(parts["unet"], "sdxl_unet" if sdxl else "sd15_unet") | renamed(parts["vae"], "sd_vae")
    tensors |= {f"{text}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    return tensors | (open_clip_names(parts["text_encoder_2"]) if sdxl else {})


def renamed(tensors: Mapping[str, Tensor], manifest: str) -> dict[str, Tensor]:
    """Tensors of diffusers' U-Net or autoencoder as a single file has them, by a golden manifest."""
    original = load_manifest(manifest, "sd_t5")["original"]
    names, convolutions = original["diffusers_to_original"], original["original_shape_differs"]
    return {
        names[name]: tensor[:, :, None, None] if name in convolutions else tensor for name, tensor in tensors.items()
    }


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of CLIPTextModelWithProjection as an SDXL file has them; the manifest of bigG lists the rules."""
    made = {}
    for name, tensor in tensors.items():
        for pattern, new in (
            (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
            (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
            (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
            (r"text_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
            (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
            (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
            (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)",
             r"transformer.resblocks.\1.attn.out_proj.\2"),
        ):  # fmt: skip
            if re.fullmatch(pattern, name):
                made[re.sub(pattern, new, name)] = tensor
    for layer in {name.split(".")[3] for name in tensors if ".layers." in name}:
        for kind in ("weight", "bias"):
            rows = [tensors[f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(rows)
    made |= {"text_projection": tensors["text_projection.weight"].T.contiguous(), "logit_scale": torch.tensor(4.6)}
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in made.items()}
