"""Caches of Cosmos: what they were made with, what they need, and published features that are none."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from families.common import weight_source
from families.cosmos.versions import VERSIONS
from tests.caches import make_cache, write_pictures
from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.many_processes import launch_processes
from tests.warpcore.runs import tiny_settings
from tools.cache_encoding import Encoding
from train.train_cosmos import TrainCosmos
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

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


def test_texts_from_a_cache_need_no_text_encoder(settings, pipeline, tmp_path, monkeypatch):
    cache = make_cache("train_cosmos", settings, tmp_path / "texts", "--features", "texts")
    monkeypatch.setitem(VERSIONS, "mini", replace(VERSIONS["mini"], text_file=None))  # as in published sizes
    for part in ("transformer", "vae"):
        shutil.copytree(pipeline / part, tmp_path / "alone" / part)
    given = settings | {"generator_checkpoint_path": str(tmp_path / "alone")}
    train(given | {"caches": [str(cache)]})
    with pytest.raises(UserError, match="text_encoder_checkpoint_path is missing, and none stands beside"):
        train(given | {"experiment_id": "without a cache"})


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


def _cache_texts(settings: dict, out: Path, killed: bool) -> None:
    """Of processes that are `killed`, the first dies at its second tar."""
    plain, tars = Encoding._encode_shard, []

    def encode_shard(encoding, number, *work):
        tars.append(number)
        if killed and len(tars) == 2 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        plain(encoding, number, *work)

    Encoding._encode_shard = encode_shard
    make_cache("train_cosmos", settings, out, "--features", "texts")
    (out.parent / f"{out.name}_{os.environ['RANK']}.json").write_text(json.dumps(tars))


def _tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.mark.slow
@pytest.mark.bits
def test_texts_that_two_processes_were_encoding_when_killed_are_finished_by_two(settings, tmp_path):
    for number in range(1, 6):
        write_pictures(tmp_path / "pictures" / f"{number}.tar", 4, first=4 * number)
    whole = _tars(make_cache("train_cosmos", settings, tmp_path / "whole", "--features", "texts"))
    assert len(whole) == 6
    out = tmp_path / "texts"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch_processes(2, _cache_texts, settings, out, True)
    done = _tars(out)
    assert 0 < len(done) < 6
    launch_processes(2, _cache_texts, settings, out, False)
    assert _tars(out) == whole
    again = [json.loads((tmp_path / f"texts_{rank}.json").read_text()) for rank in (0, 1)]
    assert len(again[0]) + len(again[1]) == 6 - len(done)
