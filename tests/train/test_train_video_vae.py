"""Training an autoencoder of clips: its update in plain PyTorch, what it exports and shows, and what it refuses."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from families.common.weight_files import metadata_of
from families.cosmos.build import autoencoder_by_itself
from tests.warpcore.runs import read_metrics, tiny_settings
from tools.build_dataset import main as build_dataset
from tools.make_demo_dataset import make_demo_dataset
from train.train_video_vae import TrainVideoVae
from warpcore.config import ConfigError, make_config
from warpcore.random import SampleRandom

pytestmark = pytest.mark.integration
SIZES = {"base_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "z_dim": 3, "patch_size": 2}


@pytest.fixture
def settings(tmp_path):
    make_demo_dataset(tmp_path / "videos", 6, video=True)
    build_dataset([str(tmp_path / "videos"), str(tmp_path / "shards")])
    keys = {"image_size": 32, "num_frames": 5, "updates": 2, "save_every": 2, "batch_size": 2, "lr": 1e-3}
    return tiny_settings(tmp_path, tmp_path / "shards", **keys | SIZES | {"discriminator_weight": 0})


def test_an_update_is_that_of_plain_pytorch(settings):
    settings |= {"updates": 1, "kl_weight": 0.01, "squared_weight": 2.0, "means_weight": 3.0, "clip_grad_norm": None}
    settings |= {"ema_start_iters": None, "eps": 1e-3, "validation_samples": 0}
    run = TrainVideoVae(make_config(TrainVideoVae.Config, settings))
    run.setup()
    batch = next(run.feed.batches())
    assert batch.images.shape == (2, 5, 3, 32, 32)
    model = run.networks["autoencoder"].model
    with torch.no_grad():  # the library clamps colours, which would then have other gradients
        model.decoder.conv_out.weight.mul_(0.2)
    library = diffusers.AutoencoderKLWan(**{k: v for k, v in model.config.items() if k[0] != "_"})
    library.load_state_dict(model.state_dict())
    run.make_update(iter([batch]))

    true = batch.images.transpose(1, 2).float() / 255
    posterior = library.encode(true * 2 - 1).latent_dist
    noise = SampleRandom(batch.seeds).normal("latent", 3, 2, 4, 4)
    rebuilt = library.decode(posterior.mean + posterior.std * noise).sample / 2 + 0.5
    error = rebuilt - true
    means = F.avg_pool3d(error, (1, 8, 8)).abs().mean()
    variance = posterior.var
    divergence = 0.5 * (posterior.mean.square() + variance - 1 - variance.log()).sum() / 2 / (5 * 3 * 32 * 32)
    loss = error.abs().mean() + 2 * error.square().mean() + 3 * means + 0.01 * divergence
    loss.backward()
    assert 0 < rebuilt.min() < rebuilt.max() < 1
    run.update = 1
    (line,) = run.metrics.flush()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["kl"] == pytest.approx(divergence.item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in library.parameters()]).norm()
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    run.close()


def test_a_run_exports_the_autoencoder_and_shows_clips(settings, tmp_path):
    settings |= {"validation_samples": 2, "ema_start_iters": None}
    assert TrainVideoVae(make_config(TrainVideoVae.Config, settings)).run() == 0
    folder = tmp_path / "tiny"
    library = diffusers.AutoencoderKLWan(**autoencoder_by_itself(folder / "autoencoder.safetensors").model.config)
    library.load_state_dict(load_file(folder / "autoencoder.safetensors"), strict=True)
    assert "AutoencoderKLWan" in metadata_of(folder / "autoencoder.safetensors")["config"]
    assert {path.suffix for path in (folder / "samples").iterdir()} == {".png", ".mp4", ".webp"}
    last = read_metrics(settings)[-1]
    assert {"validation_loss", "validation_psnr", "validation_ssim", "validation_kl"} <= last.keys()


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"num_frames": 16}, r"num_frames: clips of 16 frames.* such as 13 or 17"),
        ({"num_frames": None}, "num_frames or bucket_config is required"),
        ({"dim_mult": [1, 2]}, "dim_mult"),
    ],
)
def test_what_it_cannot_train_on_is_refused(settings, keys, error):
    with pytest.raises(ConfigError, match=error):
        make_config(TrainVideoVae.Config, settings | keys)
