"""Training an autoencoder: its update in plain PyTorch, the files that it exports, its beginnings, finetuning."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from families.common.autoencoders import Autoencoder
from families.common.weight_files import metadata_of
from families.stable_diffusion.autoencoder_training import FIRST_LOG_VARIANCE, from_scratch
from families.stable_diffusion.versions import VERSIONS
from tests.families.stable_diffusion.original_files import original_file
from tests.families.stable_diffusion.tiny_pipeline import write_sd15
from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from train.train_vae import TrainVae
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.random import SampleRandom

pytestmark = pytest.mark.integration
SIZES = {
    "block_out_channels": [8, 16, 16], "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 2,
    "mid_block_attention": True,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    data = write_shard(tmp_path / "a.tar", 8, (32, 32))
    return tiny_settings(tmp_path, data, image_size=32, updates=3, save_every=3, lr=1e-3, **SIZES)


def trained(settings: dict) -> TrainVae:
    run = TrainVae(make_config(TrainVae.Config, settings))
    assert run.run() == 0
    return run


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def test_an_update_is_that_of_plain_pytorch(settings):
    settings |= {"updates": 1, "kl_weight": 0.01, "squared_weight": 2.0, "means_weight": 3.0, "clip_grad_norm": None}
    settings |= {"ema_start_iters": None, "eps": 1e-3}  # Adam divides tiny gradients by eps: theirs are rounding
    run = TrainVae(make_config(TrainVae.Config, settings | {"experiment_id": "watched"}))
    run.setup()
    batch = next(run.feed.batches())
    library = diffusers.AutoencoderKL(
        **{k: v for k, v in run.networks["autoencoder"].model.config.items() if k[0] != "_"}
    )
    library.load_state_dict(run.networks["autoencoder"].model.state_dict())
    run.make_update(iter([batch]))

    noise = SampleRandom(batch.seeds).normal("latent", 3, 8, 8)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in library.parameters() if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in library.parameters() if p.dim() == 1], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-3,
    )  # fmt: skip
    true = batch.images.float() / 255
    posterior = library.encode(true * 2 - 1).latent_dist
    rebuilt = library.decode(posterior.mean + posterior.std * noise).sample / 2 + 0.5
    error = rebuilt - true
    means = F.avg_pool2d(rebuilt, 8) - F.avg_pool2d(true, 8)
    divergence = posterior.kl().mean() / (3 * 32 * 32)
    loss = error.abs().mean() + 2 * error.square().mean() + 3 * means.abs().mean() + 0.01 * divergence
    loss.backward()
    optimizer.step()
    run.update = 1
    (line,) = run.metrics.flush()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["kl"] == pytest.approx(divergence.item(), rel=1e-5)
    for name, expected in library.state_dict().items():
        torch.testing.assert_close(
            run.networks["autoencoder"].model.state_dict()[name], expected, rtol=1e-5, atol=1e-6
        )
    run.close()


def test_the_exported_file_is_the_same_autoencoder_with_uncorrelated_latents_of_deviation_1(settings, tmp_path):
    settings |= {"updates": 40, "save_every": 40, "ema_start_iters": None, "lr": 1e-5}
    kept = {}

    class Kept(TrainVae):
        def close(self):
            kept["state"] = {k: v.clone() for k, v in self.networks["autoencoder"].model.state_dict().items()}
            super().close()

    assert Kept(make_config(TrainVae.Config, settings)).run() == 0
    file = tmp_path / "tiny" / "autoencoder.safetensors"
    config = Autoencoder.load(file).model.config
    library = diffusers.AutoencoderKL(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    library.load_state_dict(load_file(file), strict=True)
    as_trained = diffusers.AutoencoderKL(**{name: value for name, value in config.items() if name[0] != "_"}).eval()
    as_trained.load_state_dict(kept["state"])
    assert config.scaling_factor == 1.0

    check_whitened(Autoencoder.load(file), library, as_trained)


@torch.no_grad()
def check_whitened(autoencoder, library, as_trained) -> None:
    given = pictures() / 127.5 - 1
    ours, theirs = library.encode(given).latent_dist, as_trained.encode(given).latent_dist
    torch.testing.assert_close(
        library.decode(ours.mean).sample, as_trained.decode(theirs.mean).sample, atol=1e-4, rtol=1e-4
    )
    ratio = ours.std / theirs.std  # what is drawn is scaled like the mean
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio))

    random = SampleRandom(range(64))  # like the pictures of the shard: noise
    seen = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    latents = autoencoder.scale.latents(autoencoder.moments(seen), random)
    channels = latents.transpose(0, 1).flatten(1)
    assert (channels.mean(1).abs() < 0.2).all()
    torch.testing.assert_close(channels.cov(), torch.eye(3), atol=0.2, rtol=0)


@torch.no_grad()
def test_from_scratch_signals_keep_their_size_and_residual_blocks_begin_as_nothing():
    sizes = SIZES | {"block_out_channels": [16, 32, 64, 64, 128], "norm_num_groups": 2, "mid_block_attention": False}
    torch.manual_seed(0)
    model = from_scratch(**sizes, sample_size=64)
    x = torch.randn(4, 3, 64, 64)
    hidden = model.encoder.conv_in(x)
    for block in model.encoder.down_blocks:
        hidden = block(hidden)
    assert 0.5 < hidden.std() < 2
    resnet = model.encoder.down_blocks[0].resnets[0]
    hidden = model.encoder.conv_in(x)
    assert torch.equal(resnet(hidden, None), hidden)
    log_variance = model.encode(x).latent_dist.logvar
    torch.testing.assert_close(log_variance, torch.full_like(log_variance, FIRST_LOG_VARIANCE), atol=0.5, rtol=0)


def test_finetuning_the_decoder_keeps_latents_and_scale(settings, tmp_path):
    base = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    settings = {key: value for key, value in settings.items() if key not in SIZES}
    settings |= {"autoencoder_checkpoint_path": str(tmp_path / "base")}
    trained(settings | {"decoder_only": True, "experiment_id": "decoder"})
    trained(settings | {"experiment_id": "whole"})
    before = base.state_dict()
    for run, part in {"decoder": ("decoder.", "post_quant_conv."), "whole": ("",)}.items():
        file = tmp_path / run / "autoencoder.safetensors"
        changed = {name for name, tensor in load_file(file).items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if name.startswith(part)}
        assert Autoencoder.load(file).scale.std == (2.0,)
        assert metadata_of(file)["update"] == "3"
    moments = [
        Autoencoder.load(path).moments(pictures())
        for path in (tmp_path / "base", file.parents[1] / "decoder" / file.name)
    ]
    assert torch.equal(*moments)


def test_the_autoencoder_of_a_checkpoint_in_one_file_is_a_beginning(settings, tmp_path, monkeypatch):
    pipeline, whole, alone = (tmp_path / name for name in ("sd15", "whole.safetensors", "vae.safetensors"))
    tensors, prefix = original_file(write_sd15(pipeline)), "first_stage_model."
    save_file(tensors, whole)
    save_file({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}, alone)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    for version, factor in (("sd15", 0.18215), ("sdxl", 0.13025)):  # whose published sizes are larger
        own = replace(VERSIONS[version], autoencoder=config | {"scaling_factor": factor})
        monkeypatch.setitem(VERSIONS, version, own)
    given = {key: value for key, value in settings.items() if key not in SIZES}
    before = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").state_dict()
    for changes, factor in (
        ({"autoencoder_checkpoint_path": str(whole)}, 0.18215),
        ({"autoencoder_checkpoint_path": str(alone), "autoencoder_version": "sdxl"}, 0.13025),
    ):
        run = TrainVae(make_config(TrainVae.Config, given | changes))
        state = run.build()["autoencoder"].model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert json.loads(run.file_metadata()["config"])["scaling_factor"] == factor
    with pytest.raises(
        UserError, match=r"does not say which autoencoder it is.*Write autoencoder_version: sd15 or sdxl"
    ):
        TrainVae(make_config(TrainVae.Config, given | {"autoencoder_checkpoint_path": str(alone)})).build()


def test_validation_reports_pictures_and_divergence(settings):
    settings |= {"validation_samples": 2, "updates": 2, "save_every": 2, "ema_start_iters": 1}
    trained(settings)
    line = read_metrics(settings)[-1]
    assert {"validation_psnr", "validation_ssim", "validation_kl", "validation_psnr_ema"} <= line.keys()
    assert line["validation_psnr"] == pytest.approx(
        -10 * torch.tensor(line["validation_loss"]).log10().item(), abs=1.0
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder_only": True}, "decoder_only needs the encoder's weights: give autoencoder_checkpoint_path"),
        (
            {"autoencoder_version": "sdxl"},
            "autoencoder_version says which autoencoder a file holds: give autoencoder_checkpoint_path",
        ),
        ({"norm_num_groups": 3}, "norm_num_groups: 3 does not divide block_out_channels 8"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(settings, wrong, message):
    with pytest.raises(ConfigError, match=message):
        make_config(TrainVae.Config, settings | wrong)
