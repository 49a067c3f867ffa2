"""A cascade of a few thousand weights, for tests that run the scripts."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade import versions
from modules.clip import ClipSettings, ImageTower, TextTower
from modules.effnet import EfficientNetEncoder
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from tests.golden import load_case, weights_of
from tests.warpcore.runs import write_shard

STAGE_A = {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 32}
STAGE_B = {
    "c_cond": 16, "c_hidden": [16, 16], "nhead": [-1, 2], "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 2]],
    "level_config": ["CT", "CTA"], "c_clip": 40,
}  # fmt: skip
STAGES = (("fused", 1, 3, 2, 8, 8, 1), ("fused", 1, 3, 2, 8, 8, 1), ("fused", 1, 3, 2, 8, 8, 1))


@pytest.fixture
def small_cascade(tmp_path, monkeypatch):
    """Training settings for golden's small Stage C with random small networks around it, under the name `mini`."""
    spec, tensors = load_case("stage_c_small")
    constructor = spec["constructor"] | {"dropout": 0.0}
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(10)] + ["picture"]
    text = TextTower(
        ClipSettings(embed_dim=40, text_cfg={"width": 48, "heads": 4, "layers": 1, "context_length": 8}, words=words)
    )
    text.save(tmp_path / "text.safetensors")
    encoder = EfficientNetEncoder(stages=STAGES, stochastic_depth=0.0)
    save_file(encoder.state_dict(), tmp_path / "effnet_encoder.safetensors")
    save_file(Previewer(c_hidden=8).state_dict(), tmp_path / "previewer.safetensors")
    save_file(weights_of(spec, tensors), tmp_path / "generator.safetensors")
    save_file(StageA(**STAGE_A).state_dict(), tmp_path / "stage_a.safetensors")
    save_file(StageB(**STAGE_B).state_dict(), tmp_path / "stage_b.safetensors")
    vision = {"width": 16, "head_width": 8, "layers": 1, "image_size": 16, "patch_size": 8}
    ImageTower(ClipSettings(embed_dim=24, vision_cfg=vision)).save(tmp_path / "image.safetensors")
    small = replace(
        versions.VERSIONS["mini"], stage_c=constructor, stage_b=STAGE_B, stage_a=STAGE_A,
        encoder={"stages": STAGES, "stochastic_depth": 0.0}, previewer={"c_hidden": 8}, folder=tmp_path,
        text_tower=str(tmp_path / "text.safetensors"), image_tower=str(tmp_path / "image.safetensors"),
    )  # fmt: skip
    monkeypatch.setitem(versions.VERSIONS, "mini", small)
    return {
        "experiment_id": "c", "checkpoint_path": str(tmp_path / "runs"), "model_version": "mini", "updates": 1,
        "webdataset_path": str(write_shard(tmp_path / "a.tar", 6, (64, 64))), "batch_size": 4, "image_size": 64,
        "num_workers": 0, "device": "cpu", "lr": 0.001, "clip_image_dropout": 1.0, "caption_dropout": 0.2,
        "generator_checkpoint_path": str(tmp_path / "generator.safetensors"),
    }  # fmt: skip


@pytest.fixture
def drawing_cascade(small_cascade, tmp_path):
    """Settings for scripts that draw with that cascade; in its Stage A and B no layer is zero, as if trained."""
    generator = torch.Generator().manual_seed(1)
    for name in ("stage_a", "stage_b"):
        state = load_file(tmp_path / f"{name}.safetensors")
        for key, tensor in state.items():
            if tensor.is_floating_point() and not tensor.any():
                state[key] = torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5 / 4
        save_file(state, tmp_path / f"{name}.safetensors")
    return {
        "model_version": "mini", "generator_checkpoint_path": str(tmp_path / "generator.safetensors"), "device": "cpu",
    }  # fmt: skip
