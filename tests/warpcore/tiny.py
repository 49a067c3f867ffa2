"""A whole use case in one short file, as a user would write one: a network that removes noise from small pictures.

Also a script (`python tests/warpcore/tiny.py config.yaml`), so that tests can kill it.
"""

import warpcore.openmp
import time

import torch
from torch import nn

from warpcore.config import Config
from warpcore.core import Losses, Sampled, WarpCore


class TinyConfig(Config):
    width: int = 8
    """Channels of the network."""
    dropout: float = 0.1
    """Dropout of the network."""
    seconds_per_micro_batch: float = 0.0
    """How long a micro-batch takes at least (for tests that want to meet one)."""
    break_update: int = 0
    """From this micro-batch on, the loss is not a number (for tests)."""


class Denoiser(WarpCore):
    Config = TinyConfig
    bucket_factor = 8

    def build(self):
        width = self.config.width
        body = [nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Dropout(self.config.dropout), nn.Conv2d(width, 3, 1)]
        self.mean_loss = self.bookkeeping["mean_loss"] = nn.BatchNorm1d(1, affine=False)
        return {"generator": nn.Sequential(*body)}

    def encode(self, batch, random):
        time.sleep(self.config.seconds_per_micro_batch)
        self.broken = 0 < self.config.break_update <= batch.number
        return batch.images.float() / 127.5 - 1

    def loss(self, clean, random):
        noised = clean + random.normal("noise", *clean.shape[1:]) * random.uniform("strength")[:, None, None, None]
        raw = (self.networks["generator"](noised) - clean).square().mean(dim=(1, 2, 3))
        weight = torch.nan if self.broken else 1 / (1 + self.mean_loss.running_mean)
        return Losses(raw * weight, raw, {"raw": raw})

    def update_state(self, statistics):
        self.mean_loss.running_mean.lerp_(statistics["raw"].mean(), 0.1)

    def sample(self, held_out):
        clean = self.networks["generator"](held_out.images.float() / 127.5 - 1).clamp(-1, 1)
        pictures = ((clean + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        return [Sampled(c, {"sample": p}) for c, p in zip(held_out.captions[:4], pictures, strict=False)]


if __name__ == "__main__":
    Denoiser.main()
