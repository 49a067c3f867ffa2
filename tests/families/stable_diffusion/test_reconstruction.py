"""Pictures through an autoencoder, out of a run or a file, as diffusers' own network takes them."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from families.stable_diffusion.reconstruction import AutoencoderReconstructConfig
from inference.reconstruct import main
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


def test_a_run_without_weights_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("autoencoder_checkpoint_path: somewhere\n")
    with pytest.raises(ConfigError, match="holds no weights yet"):
        make_config(AutoencoderReconstructConfig, {"run": [str(tmp_path)], "pictures": ["photo.png"]})
