"""`text_chunks`: longer texts in training, from caches, and in drawing."""

import pytest

from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from tests.caches import make_cache, write_pictures
from tests.train.test_every_script import settings_of, train
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_long_captions_are_trained_cached_and_drawn_in_chunks(small_cascade, tmp_path):
    data = write_pictures(tmp_path / "a.tar", 4, caption="abcdefg " * 14 + "{}")  # 100 letters, each a token
    settings = settings_of(small_cascade, "train_sd", "run") | {
        "webdataset_path": str(data), "text_chunks": 2, "latent": "mean", "updates": 1, "validation_samples": 0,
        "sample_prompts": ["abcdefg " * 15],
    }  # fmt: skip
    lines = train("train_sd", settings)
    other = train("train_sd", settings | {"text_chunks": 1, "experiment_id": "one chunk"})
    cache = make_cache("train_sd", settings, tmp_path / "texts", "--features", "texts", "--dtype", "float32")
    cached = settings | {"caches": [str(cache)]}
    again = train("train_sd", cached | {"experiment_id": "cached"})
    losses, short, from_cache = ([line["loss"] for line in own] for own in (lines, other, again))
    assert from_cache == pytest.approx(losses, rel=1e-5)
    assert short != pytest.approx(losses, rel=1e-5)
    with pytest.raises(UserError, match="text_chunks is 2 in the cache, 3 here"):
        train("train_sd", cached | {"experiment_id": "another length", "text_chunks": 3})

    run = f"{settings['checkpoint_path']}/run"
    given = {"run": [run], "prompts": ["a"], "image_size": 64, "steps": 1, "output_path": str(tmp_path / "drawn")}
    drawing = make_config(StableDiffusionTextToImage.Config, given)
    assert drawing.text_chunks == 2  # as it was trained
    assert len(StableDiffusionTextToImage(drawing).draw(["abcdefg " * 15], [1]).pictures) == 1
