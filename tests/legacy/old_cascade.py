"""What the writer of the old files and their tests share: the small cascade, and what was drawn with it."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from families.cascade import versions
from modules.clip import ClipSettings, TextTower

WEIGHTS = Path("weights")
STAGES = (("fused", 1, 3, 2, 4, 4, 1), ("fused", 1, 3, 2, 4, 4, 1), ("fused", 1, 3, 2, 4, 4, 1))
STAGE_C = {
    "c_r": 8, "c_cond": 16, "c_hidden": [8, 8], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]], "dropout": 0.0,
    "c_clip_text": 16, "c_clip_text_pooled": 16, "c_clip_img": 8, "c_clip_seq": 2,
}  # fmt: skip
STAGE_B = {
    "c_r": 8, "c_cond": 16, "c_hidden": [8, 8], "nhead": [-1, 2], "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [1, 1]], "level_config": ["CT", "CTA"], "c_clip": 16, "dropout": 0.0,
}  # fmt: skip
SIZES = versions.Version(
    stage_c=STAGE_C,
    stage_b=STAGE_B,
    stage_a={"bottleneck_blocks": 1, "c_hidden": 8, "codebook_size": 16},
    encoder={"stages": STAGES, "stochastic_depth": 0.0},
    previewer={"c_hidden": 4},
    stage_b_files=("stage_b.safetensors",),
    folder=WEIGHTS,
    text_tower=str(WEIGHTS / "text.safetensors"),
    image_tower=str(WEIGHTS / "image.safetensors"),
)
"""Of the version `mini` in all of these runs; paths start at the folder of the files."""
WORDS = [f"w{i}" for i in range(7)] + ["picture"]
TEXT = {"width": 16, "heads": 2, "layers": 1, "context_length": 16}
BPE = WEIGHTS / "bpe.safetensors"

BUCKET = "legacy"
DRAWINGS = {
    "stage_c": ["--run", "runs/stage_c"],
    "preview": ["--run", "runs/stage_c", "--preview", "true"],
    "v": ["--run", "runs/v", "--preview", "true"],
    "lora": ["--run", "runs/lora", "--preview", "true"],
    "lora_file": ["weights/drawing.yaml", "--lora", "runs/lora_everywhere/lora.safetensors:0.8", "--preview", "true"],
    "lora_comfyui": ["weights/drawing.yaml", "--lora", "exports/comfyui.safetensors", "--preview", "true"],
    "lora_peft": ["weights/drawing.yaml", "--lora", "exports/peft", "--preview", "true"],
    "lora_reference": ["weights/drawing.yaml", "--lora", "exports/reference.safetensors", "--preview", "true"],
    "controlnet": ["--run", "runs/controlnet", "--control_image", "weights/control.png", "--preview", "true"],
}
DRAWN = ["--image_size", "64", "--prompts", "picture w1 [dog]", "--seeds", "3", "--steps", "3", "--device", "cpu"]
"""Arguments of `inference/text_to_image.py` by the name of the drawing, and those of all drawings."""


def use() -> versions.Version:
    """Let `mini` be this cascade."""
    versions.VERSIONS["mini"] = replace(SIZES)
    return versions.VERSIONS["mini"]


def write_bpe_tower(path: Path = BPE) -> None:
    """A text tower with CLIP's 49,408 tokens, the same on every machine: 3 MB, so it is not kept."""
    tower = TextTower(ClipSettings(embed_dim=16, text_cfg=TEXT))
    fill(tower)
    tower.save(path)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Numbers within 0.2 of zero that follow from their place alone, without a generator or a rounding of sines."""
    for number, (_, tensor) in enumerate(sorted(network.state_dict().items())):
        if tensor.is_floating_point():
            places = torch.arange(tensor.numel(), dtype=torch.int64) + 7919 * number
            tensor.copy_(((places * 2654435761 % 1009 - 504).double() / 2520).reshape(tensor.shape))
