"""A run from a cache holds no network that has nothing to do."""

import gc
from pathlib import Path

import pytest
import torch

from families.cascade import build
from families.common.prompts import prompt_features
from modules.clip import ImageTower, TextTower
from modules.effnet import EfficientNetEncoder
from tests.caches import make_cache, write_pictures
from tests.families.common.test_cache import SCRIPTS, use_case
from tests.tiers import represented_by
from tests.warpcore.runs import read_metrics
from warpcore.config import make_config

ENCODERS = (EfficientNetEncoder, TextTower, ImageTower)
CHANGES = {"train_c": {"sample_prompts": ["picture w1", "w2"]}, "train_c_lora": {}, "train_b": {}}
"""Of train_c the prompts are drawn, of the others held-out samples."""


@pytest.fixture
def settings(small_cascade, tmp_path):
    write_pictures(tmp_path / "pictures" / "0.tar", 12)

    def of(script: str) -> dict:
        made = small_cascade | {
            "webdataset_path": str(tmp_path / "pictures"), "multi_aspect_ratio": [1, 2], "batch_size": 2, "updates": 2,
            "save_every": 2, "validation_samples": 3, "crop_mode": "center", "sample_steps": 1, "sample_count": 2,
        } | SCRIPTS[script] | CHANGES[script]  # fmt: skip
        return {name: value for name, value in made.items() if value is not None}

    return of


@pytest.mark.integration
@pytest.mark.parametrize("script", represented_by("train_c", of=SCRIPTS))
def test_a_run_from_a_cache_has_no_encoder_in_memory(script, settings, tmp_path, monkeypatch):
    cached = settings(script) | {"webdataset_path": str(make_cache(script, settings(script), tmp_path / "cache"))}
    kind, seen = use_case(script), []

    def watched(self, *arguments):
        gc.collect()
        seen.append([type(one).__name__ for one in gc.get_objects() if type(one) in ENCODERS])
        return kind.loss(self, *arguments)

    watching = type(kind.__name__, (kind,), {"loss": watched})
    gc.collect()
    already = sum(type(one) in ENCODERS for one in gc.get_objects())  # of other tests
    assert watching(make_config(kind.Config, cached)).run() == 0
    assert {len(found) for found in seen} == {already}, seen
    [picture] = Path(cached["checkpoint_path"], cached["experiment_id"], "samples").glob("*.png")
    assert picture.stat().st_size > 1000

    def refused(*_, **__):
        raise AssertionError("an encoder is built")

    for name in ("encoder", "text", "image"):  # the next start finds the prompts in the run's folder
        monkeypatch.setattr(build, name, refused)
    assert kind(make_config(kind.Config, cached | {"updates": 4, "save_every": 4})).run() == 0
    assert [line["update"] for line in read_metrics(cached)][-1] == 4


def test_prompts_are_encoded_once_until_what_they_depend_on_changes(tmp_path):
    opened = []

    def open_encoder():
        opened.append(1)
        return lambda texts: {"hidden": torch.tensor([[float(len(text))] for text in texts], dtype=torch.float16)}

    def features(texts, **made_with):
        return prompt_features(tmp_path / "run" / "prompts.safetensors", texts, made_with, open_encoder, {})

    for _ in range(2):
        assert features(["", "dog"], sha256="1")["hidden"].tolist() == [[0.0], [3.0]]
    assert len(opened) == 1
    assert features(["", "a dog"], sha256="1")["hidden"].tolist() == [[0.0], [5.0]]
    features(["", "a dog"], sha256="2")
    assert len(opened) == 3
    (tmp_path / "run" / "prompts.safetensors").write_bytes(b"damaged")
    features(["", "a dog"], sha256="2")
    assert len(opened) == 4
