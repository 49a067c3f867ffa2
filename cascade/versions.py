"""Sizes of the model family: what `model_version` stands for."""

from dataclasses import dataclass, field
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
"""Where downloaded and shipped weights lie."""


@dataclass(frozen=True)
class Version:
    """One size of the cascade: constructor arguments of its networks, and where their weights are by default."""

    stage_c: dict
    encoder: dict = field(default_factory=dict)
    previewer: dict = field(default_factory=dict)
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


MINI_ENCODER_STAGES = (
    ("fused", 1, 3, 2, 24, 48, 1),
    ("fused", 1, 3, 2, 48, 96, 2),
    ("fused", 1, 3, 2, 96, 192, 2),
)

VERSIONS = {
    "3.6B": Version(stage_c={}),
    "1B": Version(stage_c={"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]}),
    "mini": Version(
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
        encoder={"stages": MINI_ENCODER_STAGES, "stochastic_depth": 0.0},
        previewer={"c_hidden": 64},
        compression=16,
        bucket_factor=32,
        text_tower=str(MODELS / "mini" / "text_tower.safetensors"),
        image_tower=str(MODELS / "mini" / "image_tower.safetensors"),
        folder=MODELS / "mini",
    ),
}
