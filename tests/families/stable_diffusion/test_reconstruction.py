"""Pictures through an autoencoder, out of a run or a file, as diffusers' own network takes them."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from families.stable_diffusion.reconstruction import AutoencoderReconstructConfig
from families.stable_diffusion.versions import VERSIONS
from inference.reconstruct import main
from tests.families.stable_diffusion.original_files import original_file
from tests.families.stable_diffusion.tiny_pipeline import write_sd15
from tests.warpcore.runs import tiny_settings, write_shard
from train.train_vae import TrainVae
from warpcore.config import ConfigError, make_config

pytestmark = pytest.mark.integration


@pytest.fixture
def reconstruct(monkeypatch, tmp_path):
    def reconstruct(*arguments: str) -> np.ndarray:
        fixed = [f"pictures={tmp_path / 'photo.png'}", f"output_path={tmp_path / 'rebuilt'}", "overwrite=true"]
        monkeypatch.setattr("sys.argv", ["reconstruct.py", *fixed, "device=cpu", *arguments])
        main()
        return np.array(Image.open(tmp_path / "rebuilt" / "0000_photo.png"))

    return reconstruct


@pytest.fixture
def library(tmp_path) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "vae")
    return network.eval()


@torch.no_grad()
def test_runs_and_files_rebuild_pictures_of_any_size(reconstruct, library, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 49, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    extended = np.concatenate([picture, picture[:, -1:]], axis=1)
    given = torch.from_numpy(extended).permute(2, 0, 1)[None] / 127.5 - 1
    rebuilt = library.decode(library.encode(given).latent_dist.mode()).sample
    expected = ((rebuilt / 2 + 0.5).clamp(0, 1) * 255).round().byte()[0, :, :, :-1].permute(1, 2, 0).numpy()

    by_file = reconstruct(f"autoencoder_checkpoint_path={tmp_path / 'vae'}")
    assert np.abs(by_file.astype(int) - expected).max() <= 1
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 4), updates=1, lr=1e-9)
    with torch.enable_grad():
        run = TrainVae(make_config(TrainVae.Config, settings | {"autoencoder_checkpoint_path": str(tmp_path / "vae")}))
        assert run.run() == 0
    for source in (
        f"run={tmp_path / 'tiny'}",
        f"autoencoder_checkpoint_path={tmp_path / 'tiny/autoencoder.safetensors'}",
    ):
        assert np.abs(reconstruct(source).astype(int) - expected).max() <= 1


def test_every_place_of_an_autoencoder_rebuilds_alike(reconstruct, tmp_path, monkeypatch):
    """In a pipeline, in a checkpoint in one file, and in files of its own that do not say which one it is."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    pipeline, whole, alone, run = (tmp_path / name for name in ("sd15", "whole.safetensors", "vae.safetensors", "run"))
    write_sd15(pipeline)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    monkeypatch.setitem(VERSIONS, "sd15", replace(VERSIONS["sd15"], autoencoder=config))  # published ones are larger
    tensors = original_file(pipeline)
    save_file(tensors, whole)
    prefix = "first_stage_model."
    save_file({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}, alone)
    run.mkdir()
    (run / "config.yaml").write_text(f"model_version: sd15\ngenerator_checkpoint_path: {whole}\n")
    save_file({"x": torch.zeros(1)}, run / "lora.safetensors", {"family": "stable_diffusion"})
    expected = reconstruct(f"autoencoder_checkpoint_path={pipeline / 'vae'}")
    library = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    for source in (pipeline, whole, alone, library):
        assert np.array_equal(reconstruct(f"autoencoder_checkpoint_path={source}"), expected), source
    assert np.array_equal(reconstruct(f"run={run}"), expected)


def test_a_run_of_the_mini_has_the_autoencoder_that_ships(tmp_path):
    (tmp_path / "config.yaml").write_text("model_version: mini\n")
    save_file({"x": torch.zeros(1)}, tmp_path / "generator.safetensors")
    config = make_config(AutoencoderReconstructConfig, {"run": [str(tmp_path)], "pictures": ["photo.png"]})
    assert config.autoencoder_checkpoint_path == VERSIONS["mini"].autoencoder_file


def test_a_run_without_weights_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("autoencoder_checkpoint_path: somewhere\n")
    with pytest.raises(ConfigError, match="holds no weights yet"):
        make_config(AutoencoderReconstructConfig, {"run": [str(tmp_path)], "pictures": ["photo.png"]})
