"""A whole use case on clips in one short file: a network that removes noise from small clips and pictures.

Also a script (`python tests/warpcore/tiny_clips.py config.yaml`), so that tests can kill it.
"""

import warpcore.openmp

from torch import nn

from warpcore.clip_keys import ClipKeys
from warpcore.config import Config
from warpcore.core import Losses, WarpCore


class ClipConfig(ClipKeys, Config):
    pass


class ClipDenoiser(WarpCore):
    Config = ClipConfig
    bucket_factor = 8
    takes_videos = True
    needs_captions = draws_samples = False

    def build(self):
        return {"generator": nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.GELU(), nn.Conv3d(4, 3, 1))}

    def encode(self, batch, random):
        return batch.images.float().transpose(1, 2) / 127.5 - 1  # (B, 3, T, H, W)

    def loss(self, clean, random):
        strength = random.uniform("strength")[:, None, None, None, None]
        noised = clean + random.normal("noise", *clean.shape[1:]) * strength
        raw = (self.networks["generator"](noised) - clean).square().mean(dim=(1, 2, 3, 4))
        return Losses(raw, raw)


if __name__ == "__main__":
    ClipDenoiser.main()
