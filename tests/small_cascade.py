"""A cascade of a few thousand weights, for tests that run the scripts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.cascade import versions
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


@pytest.fixture(scope="session")
def cascade_files(tmp_path_factory) -> Path:
    """A folder with the weights of golden's small Stage C and of random small networks around it. Tests copy them."""
    folder = tmp_path_factory.mktemp("cascade")
    spec, tensors = load_case("stage_c_small")
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(10)] + ["picture"]
    text = TextTower(
        ClipSettings(embed_dim=40, text_cfg={"width": 48, "heads": 4, "layers": 1, "context_length": 8}, words=words)
    )
    text.save(folder / "text.safetensors")
    encoder = EfficientNetEncoder(stages=STAGES, stochastic_depth=0.0)
    save_file(encoder.state_dict(), folder / "effnet_encoder.safetensors")
    save_file(Previewer(c_hidden=8).state_dict(), folder / "previewer.safetensors")
    save_file(weights_of(spec, tensors), folder / "generator.safetensors")
    save_file(StageA(**STAGE_A).state_dict(), folder / "stage_a.safetensors")
    save_file(StageB(**STAGE_B).state_dict(), folder / "stage_b.safetensors")
    vision = {"width": 16, "head_width": 8, "layers": 1, "image_size": 16, "patch_size": 8}
    ImageTower(ClipSettings(embed_dim=24, vision_cfg=vision)).save(folder / "image.safetensors")
    return folder


def put_cascade(cascade_files: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Copy those weights to a folder and make them the version `mini`; returns settings of a training with them."""
    torch.manual_seed(0)  # for tests that draw weights or pictures of their own
    shutil.copytree(cascade_files, folder, dirs_exist_ok=True)
    small = replace(
        versions.VERSIONS["mini"], stage_c=load_case("stage_c_small")[0]["constructor"] | {"dropout": 0.0},
        stage_b=STAGE_B, stage_a=STAGE_A, encoder={"stages": STAGES, "stochastic_depth": 0.0},
        previewer={"c_hidden": 8}, folder=folder, text_tower=str(folder / "text.safetensors"),
        image_tower=str(folder / "image.safetensors"),
    )  # fmt: skip
    monkeypatch.setitem(versions.VERSIONS, "mini", small)
    return {
        "experiment_id": "c", "checkpoint_path": str(folder / "runs"), "model_version": "mini", "updates": 1,
        "webdataset_path": str(write_shard(folder / "a.tar", 6, (64, 64))), "batch_size": 4, "image_size": 64,
        "num_workers": 0, "device": "cpu", "lr": 0.001, "clip_image_dropout": 1.0, "caption_dropout": 0.2,
        "generator_checkpoint_path": str(folder / "generator.safetensors"),
    }  # fmt: skip


@pytest.fixture
def small_cascade(cascade_files, tmp_path, monkeypatch) -> dict:
    """Training settings for golden's small Stage C with random small networks around it, under the name `mini`."""
    return put_cascade(cascade_files, tmp_path, monkeypatch)


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
