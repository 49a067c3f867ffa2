"""Sizes of the model family: what `model_version` stands for."""

from dataclasses import dataclass, field
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "models"
"""Where downloaded and shipped weights lie."""


@dataclass(frozen=True)
class Version:
    """One size of the cascade: constructor arguments of its networks, and where their weights are by default."""

    stage_c: dict = field(default_factory=dict)
    stage_b: dict = field(default_factory=dict)
    stage_a: dict = field(default_factory=dict)
    encoder: dict = field(default_factory=dict)
    previewer: dict = field(default_factory=dict)
    stage_b_files: tuple[str, ...] = ("stage_b_bf16.safetensors", "stage_b.safetensors")
    """Names that weights of Stage B have in the folder; the first one there is taken."""
    compression: float = 42.67
    """Pixels of the final picture per position of Stage C's latents."""
    bucket_factor: int = 32
    """Sides of training pictures are multiples of this: the encoder's compression times Stage C's patch size."""
    text_tower: str = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    image_tower: str = "openai/clip-vit-large-patch14"
    folder: Path = MODELS

    @property
    def patch_size(self) -> int:
        """Positions of the latents per side that Stage C takes as one."""
        return self.stage_c.get("patch_size", 1)

    @property
    def encoder_compression(self) -> int:
        """Pixels per position of the encoder's latents."""
        return self.bucket_factor // self.patch_size

    @property
    def image_width(self) -> int:
        """Of the image condition that Stage C takes."""
        return self.stage_c.get("c_clip_img", 768)


LARGE = Version()
"""Stage C with 3.6 and Stage B with 1.6 billion parameters."""
SMALL = Version(
    stage_c={"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]},
    stage_b={
        "c_hidden": [320, 576, 1152, 1152],
        "nhead": [-1, 9, 18, 18],
        "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
        "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
    },
    stage_b_files=("stage_b_lite_bf16.safetensors", "stage_b_lite.safetensors"),
)
"""Stage C with 1.0 and Stage B with 0.7 billion parameters."""

MINI_ENCODER_STAGES = (
    ("fused", 1, 3, 2, 24, 48, 1),
    ("fused", 1, 3, 2, 48, 96, 2),
    ("fused", 1, 3, 2, 96, 192, 2),
)
MINI = Version(
    stage_c={
        "patch_size": 2,
        "c_cond": 128,
        "c_hidden": [128, 128],
        "nhead": [4, 4],
        "blocks": [[1, 2], [2, 1]],
        "kernel_size": 7,  # on 4 x 4 positions, wide kernels feel the edges: they learn where things are
        "c_clip_text": 64,
        "c_clip_text_pooled": 64,
        "c_clip_img": 64,
        "dropout": 0.0,
    },
    stage_b={
        "c_cond": 64,
        "c_hidden": [64, 96],
        "nhead": [-1, 4],
        "blocks": [[1, 2], [2, 1]],
        "block_repeat": [[1, 1], [1, 1]],
        "level_config": ["CT", "CTA"],
        "c_clip": 64,
    },
    stage_a={"bottleneck_blocks": 2, "c_hidden": 64, "codebook_size": 512},
    encoder={"stages": MINI_ENCODER_STAGES, "stochastic_depth": 0.0},
    previewer={"c_hidden": 64},
    stage_b_files=("stage_b.safetensors",),
    compression=16,
    text_tower=str(MODELS / "mini" / "text_tower.safetensors"),
    image_tower=str(MODELS / "mini" / "image_tower.safetensors"),
    folder=MODELS / "mini",
)
"""A toy cascade for pictures of 128 px."""

VERSIONS = {"3.6B": LARGE, "3B": LARGE, "1B": SMALL, "700M": SMALL, "mini": MINI}
"""Stage C is named by 3.6B, 1B and mini; Stage B by 3B, 700M and mini."""
