"""The shipped configs fit the scripts that they name."""

import re
from pathlib import Path

import pytest
import torch

from families.cascade.reconstruction import CascadeReconstructConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from families.cosmos.text_to_image import CosmosTextToImageConfig
from families.dit.latte_class_to_image import LatteClassToImage
from families.open_sora.text_to_video import OpenSoraTextToVideoConfig
from families.stable_diffusion.text_to_image import SdTextToImageConfig
from warpcore.config import make_config
from warpcore.config_files import read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "inference").glob("*.yaml"))
NEEDED = {
    "class_to_image": (LatteClassToImage.Config, {"classes": ["YoYo"]}),
    "text_to_image": (CascadeTextToImageConfig, {"prompts": ["a"], "generator_checkpoint_path": "c.safetensors"}),
    "text_to_video": (OpenSoraTextToVideoConfig, {"prompts": ["a"], "generator_checkpoint_path": "a"}),
    "reconstruct": (CascadeReconstructConfig, {"pictures": ["a"], "stage_b_checkpoint_path": "b.safetensors"}),
}
"""A script's keys, and those that it wants from the command line or from weights on the disk."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_fits_the_script_that_it_names(path, tmp_path):
    text = path.read_text()
    kind, needed = NEEDED[re.search(r"inference/(\w+)\.py configs/inference/" + path.name, text).group(1)]
    if "control_" in text:
        (tmp_path / "picture.png").touch()
        needed = needed | {"controlnet": ["a.safetensors"], "control_image": [tmp_path / "picture.png"]}
    if "Stable Diffusion" in text or "SDXL" in text:
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        kind, needed = SdTextToImageConfig, needed | {"generator_checkpoint_path": tmp_path}
    if "Cosmos" in text:
        (tmp_path / "config.json").write_text(
            '{"_class_name": "CosmosTransformer3DModel", "extra_pos_embed_type": null}'
        )
        kind = CosmosTextToImageConfig
        needed = needed | dict.fromkeys(["generator_checkpoint_path", "text_encoder_checkpoint_path"], tmp_path)
    if "Latte" in text:
        shapes = {"x_embedder.proj.weight": (1152, 4, 2, 2), "y_embedder.embedding_table.weight": (102, 1152),
                  "final_layer.linear.weight": (32, 1152), "temp_embed": (1, 16, 1152)}  # fmt: skip
        torch.save({"ema": {name: torch.zeros(shape) for name, shape in shapes.items()}}, tmp_path / "latte.pt")
        needed = needed | {"generator_checkpoint_path": str(tmp_path / "latte.pt"), "model_version": "XL/2"}
    make_config(kind, read_config(path)[0] | {"run": []} | needed)
