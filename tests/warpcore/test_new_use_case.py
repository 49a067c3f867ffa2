"""Adding a use case needs one file: this is a whole one."""

import pytest
import torch
from torch import nn

from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from warpcore.config import Config, make_config
from warpcore.core import Losses, Sampled, WarpCore

pytestmark = pytest.mark.integration

# --- the file that a user would write: about 20 lines


class AutoencoderConfig(Config):
    width: int = 16
    """Channels in the middle."""


class TrainAutoencoder(WarpCore):
    Config = AutoencoderConfig
    trainable = {"encoder": {}, "decoder": {"lr_scale": 2.0}}

    def build(self):
        width = self.config.width
        return {"encoder": nn.Conv2d(3, width, 4, stride=4), "decoder": nn.ConvTranspose2d(width, 3, 4, stride=4)}

    def loss(self, batch, random):
        pictures = batch.images.float() / 255
        noise = random.normal("noise", self.config.width, 1, 1) * 0.01
        rebuilt = self.networks["decoder"](self.networks["encoder"](pictures) + noise)
        error = (rebuilt - pictures).square().mean(dim=(1, 2, 3))
        return Losses(error, error)

    def sample(self, held_out):
        rebuilt = self.networks["decoder"](self.networks["encoder"](held_out.images.float() / 255)).clamp(0, 1)
        pictures = (rebuilt * 255).byte().permute(0, 2, 3, 1).numpy()
        return [Sampled(text, {"rebuilt": p}) for text, p in zip(held_out.captions, pictures, strict=True)]


# --- end of that file


def test_a_new_use_case_trains_saves_and_draws(tmp_path):
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 12), updates=40, validation_samples=4)
    run = TrainAutoencoder(make_config(AutoencoderConfig, settings))
    assert run.run() == 0
    names = {path.name for path in (tmp_path / "tiny").glob("*.safetensors")}
    assert names == {f"{name}{suffix}.safetensors" for name in ("encoder", "decoder") for suffix in ("", "_ema")}
    assert (tmp_path / "tiny" / "samples" / "00000040.png").exists()
    losses = torch.tensor([line["loss"] for line in read_metrics(settings)])
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
