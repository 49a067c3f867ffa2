"""The shipped configs fit the scripts that they name."""

import re
from pathlib import Path

import pytest
import yaml

from families.cascade.reconstruction import CascadeReconstructConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from families.cosmos.text_to_image import CosmosTextToImageConfig
from families.stable_diffusion.text_to_image import SdTextToImageConfig
from warpcore.config import make_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "inference").glob("*.yaml"))
NEEDED = {
    "text_to_image": (CascadeTextToImageConfig, {"prompts": ["a"], "generator_checkpoint_path": "c.safetensors"}),
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
    make_config(kind, yaml.safe_load(text) | {"run": []} | needed)
