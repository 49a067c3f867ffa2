"""Index columns, sizes and crops of a batch that is read from a cache are those of the pictures."""

from itertools import islice

import pytest
import torch

from tests.caches import make_cache, write_pictures
from train.train_c import TrainStageC
from warpcore.config import make_config

pytestmark = pytest.mark.integration


class WithGeometry(TrainStageC):
    needs_geometry = True


def batches(settings: dict, count: int = 4) -> list:
    run = WithGeometry(make_config(TrainStageC.Config, settings))
    try:
        run.setup()
        return list(islice(run.feed.batches(), count))
    finally:
        run.close()


@pytest.mark.parametrize("crop_mode", ["random", pytest.param("smart", marks=pytest.mark.slow)])
def test_a_cache_keeps_columns_and_crops(small_cascade, tmp_path, crop_mode):
    write_pictures(tmp_path / "pictures" / "0.tar", 8, 0)
    settings = small_cascade | {
        "webdataset_path": str(tmp_path / "pictures"), "multi_aspect_ratio": [1, 2], "batch_size": 2, "updates": 4,
        "crop_mode": crop_mode, "columns": ["score", "width"], "seed": 3,
        "captions_getter": [["txt", "json.score", "json"], 'lambda t, s, j: t + " w" + str(s) + str(j["score"])'],
    }  # fmt: skip
    cache = make_cache("train_c", settings, tmp_path / "cache", "--variants", "2")
    from_pictures = batches(settings, 8)  # two epochs, whose crops are the two variants
    from_cache = batches(settings | {"webdataset_path": str(cache), "experiment_id": "cached"}, 8)
    crops = {}
    for batch in from_pictures:
        for place, key in enumerate(batch.keys):
            crops.setdefault(key, []).append(batch.geometry.crop[place].tolist())
    for batch, other in zip(from_cache, from_pictures, strict=True):
        assert batch.keys == other.keys
        assert batch.captions == other.captions
        assert all(caption.count(" w") == 2 for caption in batch.captions)
        assert batch.images is None
        assert all(torch.equal(batch.columns[name], other.columns[name]) for name in ("score", "width"))
        for name in ("source", "resized", "size"):
            assert torch.equal(getattr(batch.geometry, name), getattr(other.geometry, name))
        for place, key in enumerate(batch.keys):
            assert batch.geometry.crop[place].tolist() in crops[key]
    assert len({tuple(crop) for of_key in crops.values() for crop in of_key}) > 2
