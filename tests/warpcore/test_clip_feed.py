"""What a run on clips takes of its config: frames by `frame_rate`, and no pictures beside videos."""

import pytest
from torch import nn

from tests.warpcore.data.clips import clip
from tests.warpcore.data.tars import write_tar
from tests.warpcore.runs import read_metrics, tiny_settings, train_here
from warpcore.clip_keys import ClipKeys
from warpcore.config import Config, make_config
from warpcore.core import Losses, WarpCore
from warpcore.data.fields import PictureField
from warpcore.data.loader import Loader
from warpcore.errors import UserError


class ClipConfig(ClipKeys, Config):
    pass


class Brightness(WarpCore):
    """Learns how bright clips are."""

    Config = ClipConfig
    bucket_factor = 8
    takes_videos = True
    needs_captions = draws_samples = False

    def build(self):
        return {"generator": nn.Linear(1, 1)}

    def encode(self, batch, random):
        return batch.images.float().mean(dim=(1, 2, 3, 4)) / 255, batch.columns["fps"]

    def loss(self, inputs, random):
        brightness, fps = inputs
        raw = (self.networks["generator"](brightness[:, None] * 0)[:, 0] - brightness).square()
        return Losses(raw, raw, metrics={"fps": fps})


class WithMasks(Brightness):
    def extra_fields(self):
        return {"mask": PictureField(("mask.png",))}


@pytest.fixture
def settings(tmp_path):
    data = write_tar(tmp_path / "a.tar", [(f"{n}.mp4", clip("h264")) for n in range(4)])
    return tiny_settings(tmp_path, data, num_frames=9, batch_size=2, image_size=32, updates=1, save_every=1)


@pytest.mark.integration
def test_clips_come_at_the_frame_rate_of_the_config_and_the_loader_knows_their_size(settings, monkeypatch):
    told = []

    class Knowing(Loader):
        def __init__(self, *arguments, batch_bytes, **keywords):
            told.append(batch_bytes)
            super().__init__(*arguments, batch_bytes=batch_bytes, **keywords)

    monkeypatch.setattr("warpcore.feed.Loader", Knowing)
    assert train_here(settings | {"frame_rate": 8.0}, Brightness, ClipConfig)[0] == 0
    assert read_metrics(settings)[-1]["fps"] == pytest.approx(8.0)
    assert told == [2 * 9 * 32 * 32 * 3]


def test_masks_beside_clips_are_refused_by_name(settings, monkeypatch):
    with pytest.raises(UserError, match=r"a \.mask\.png belongs to one picture, and this script trains on clips"):
        WithMasks(make_config(ClipConfig, settings)).data_needs()
    monkeypatch.setattr(WithMasks, "takes_videos", False)
    assert WithMasks(make_config(ClipConfig, settings)).data_needs().extra
