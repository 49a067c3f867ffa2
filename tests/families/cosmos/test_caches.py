"""Caches of Cosmos: what they were made with, what they need, and published features that are none."""

import json
from pathlib import Path

import pytest

from families.common import weight_source
from tests.caches import make_cache, write_pictures
from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.warpcore.runs import tiny_settings
from train.train_cosmos import TrainCosmos
from warpcore.config import ConfigError, make_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def settings(pipeline, tmp_path) -> dict:
    write_pictures(tmp_path / "pictures" / "0.tar", 4)
    return tiny_settings(
        tmp_path, tmp_path / "pictures", model_version="mini", generator_checkpoint_path=str(pipeline), updates=1,
        save_every=1, sample_steps=1, sample_count=1, crop_mode="center", ema_start_iters=None,
        text_encoder_precision="float32",
    )  # fmt: skip


def train(settings: dict) -> TrainCosmos:
    run = TrainCosmos(make_config(TrainCosmos.Config, settings))
    assert run.run() == 0
    return run


@pytest.mark.parametrize(
    ("kind", "key", "network"),
    [("texts", "text_encoder_precision", "text"), ("latents", "autoencoder_precision", "autoencoder")],
)
def test_features_of_another_precision_are_refused_but_those_of_older_caches_are_read(
    settings, tmp_path, kind, key, network
):
    cache = make_cache("train_cosmos", settings | {key: "bfloat16"}, tmp_path / "cache", "--features", kind)
    given = settings | {"caches": [str(cache)]}
    with pytest.raises(ConfigError, match=f"the {network} network is of bfloat16 in the cache, float32 here"):
        train(given)
    train(given | {key: "bfloat16"})
    for file in cache.rglob("cache.json"):  # as caches were before they said it
        about = json.loads(file.read_text())
        assert about["networks"][network].pop("precision") == "bfloat16"
        file.write_text(json.dumps(about))
    train(given | {"experiment_id": "older"})


HUB = {
    "generator_checkpoint_path": "owner/cosmos", "autoencoder_checkpoint_path": "owner/vae",
    "text_encoder_checkpoint_path": "owner/t5",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("texts", {"text_encoder_checkpoint_path"}),
        ("latents", {"generator_checkpoint_path", "autoencoder_checkpoint_path"}),
    ],
)
def test_only_what_makes_the_features_is_downloaded(settings, pipeline, tmp_path, monkeypatch, kind, needed):
    asked, plain = set(), weight_source.local_weights

    def local(path: Path, key: str) -> Path:
        asked.update([key] if str(path) == HUB[key] else [])
        return pipeline if str(path) == HUB[key] else plain(path, key)

    monkeypatch.setattr(weight_source, "local_weights", local)
    make_cache("train_cosmos", settings | HUB, tmp_path / "cache", "--features", kind)
    assert asked == needed
