"""Networks of NOVA that are told classes in place of texts: what they learn of a batch, their caches, their files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from families.common.class_training import CLASS
from families.common.family import CLASS_TO_IMAGE, TEXT_TO_IMAGE
from families.common.library_files import CONFIG_KEY
from families.common.weight_files import FAMILY_KEY
from families.nova import build
from families.nova.config import NovaConfig, NovaSettings
from families.registry import family_of, load_task
from modules.nova import NOVATransformer
from tests.caches import make_cache
from tests.families.dit.classed import CLASSES, numbered, write_classed
from tests.families.nova.test_bad_input import training
from tests.families.nova.test_imports import MINI, imported, record, write_records
from tests.warpcore.runs import read_metrics
from train.train_nova import TrainNova
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"


def written(path: Path, **keys) -> Path:
    """A file as runs export it, of a mini."""
    numbers = build.network_numbers(NovaSettings(model_version="mini", **keys))
    about = {FAMILY_KEY: "nova", CONFIG_KEY: json.dumps(numbers)}
    save_file(NOVATransformer(**numbers).state_dict(), path, about)
    return path


def test_a_network_of_classes_has_a_row_for_each_and_one_for_none():
    network = build.network(training(num_classes=7).config)
    assert network.label_embed.weight.shape == (8, 128)
    assert network.text_embed is None
    assert network.condition(labels=torch.tensor([0, 7])).shape == (2, 1, 128)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_version": "mini-video", "num_frames": 5, "num_classes": 7}, "mini-video draws clips, which NOVA lea"),
        ({"class_names": ["a", "b"], "num_classes": 3}, "2 names for 3 classes"),
        ({"class_names": ["a", "b"], "sample_classes": ["c"]}, "sample_classes: 'c' is no class"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        training(**keys)


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"num_classes": 7}, {}, "has num_classes: 7, and this configuration num_classes: null: write num_classes: 7"),
        ({}, {"num_classes": 7}, "has num_classes: null, and this configuration num_classes: 7: write num_classes: n"),
        ({"num_classes": 7}, {"num_classes": 8}, "has num_classes: 7, and this configuration num_classes: 8"),
    ],
)
def test_weights_that_are_told_something_else_are_refused(saved, here, message, tmp_path):
    path = written(tmp_path / "a.safetensors", **saved)
    with pytest.raises(UserError, match=message):
        training(generator_checkpoint_path=str(path), **here).begin(None)


def test_scripts_of_drawing_name_each_other(tmp_path):
    of_texts, of_classes = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", num_classes=7)
    assert family_of(of_classes).name == "nova"
    with pytest.raises(ConfigError, match=r"is told classes: draw with inference/class_to_image.py"):
        load_task(TEXT_TO_IMAGE, [f"{KEY}={of_classes}", "prompts=['a']"])
    with pytest.raises(ConfigError, match=r"is told texts: draw with inference/text_to_image.py"):
        load_task(CLASS_TO_IMAGE, [f"{KEY}={of_texts}", "classes=[1]"])
    kind, config = load_task(CLASS_TO_IMAGE, [f"{KEY}={of_classes}", "classes=[1, 6]"])
    assert kind(config).titles == ["class 1", "class 6"]
    kind, config = load_task(CLASS_TO_IMAGE, [f"{KEY}={of_classes}", "classes=[7]"])
    with pytest.raises(UserError, match=r"class 7 is outside of 0 to 6 \(num_classes: 7\)"):
        kind(config)


def of_run(folder: Path, data: Path, **changes) -> dict:
    return {
        "experiment_id": "run", "checkpoint_path": str(folder / "runs"), "webdataset_path": str(data), "device": "cpu",
        "model_version": "mini", "num_classes": CLASSES, "num_frames": 1, "image_size": 32, "batch_size": 4,
        "updates": 1, "save_every": 1, "log_every": 1, "num_workers": 0, "lr": 0.01, "sample_steps": 1,
        "sample_groups": 1, "sample_count": 2, "loss_repeat": 1, "crop_mode": "center",
    } | changes  # fmt: skip


class Seeing(TrainNova):
    seen: list

    def encode(self, batch, random):
        inputs = super().encode(batch, random)
        self.seen.append((batch, inputs[1]))
        return inputs


def run(settings: dict) -> list:
    """Batches that a training sees, and what its network is told of each."""
    Seeing.seen = []
    assert Seeing(make_config(NovaConfig, settings)).run() == 0
    return Seeing.seen


@pytest.mark.integration
@pytest.mark.parametrize("dropout", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_run_from_a_cache_of_moments_alone_is_told_classes(tmp_path, dropout):
    data = write_classed(tmp_path / "data" / "a.tar", numbered(4))
    given = of_run(tmp_path, data, class_dropout=dropout)
    cache = make_cache("train_nova", given, tmp_path / "cache", "--dtype", "float32")
    assert list(json.loads((cache / "cache.json").read_text(encoding="utf-8"))["features"]) == ["moments"]
    run(given)
    expected = read_metrics(given)
    alone = given | {"experiment_id": "cached", "webdataset_path": str(cache)}
    for batch, told in run(alone):
        assert batch.images is None
        assert batch.extra[CLASS].tolist() == [int(key) % CLASSES for key in batch.keys]
        assert told["labels"].tolist() == (batch.extra[CLASS].tolist() if not dropout else [CLASSES] * 4)
    assert [line["loss"] for line in read_metrics(alone)] == pytest.approx([line["loss"] for line in expected])


@pytest.mark.integration
@pytest.mark.slow
def test_records_with_labels_are_learned(tmp_path):
    draw = np.random.default_rng(0)
    records = [record(draw.normal(size=(32, 2, 2)), label=i % CLASSES) for i in range(4)]
    given = of_run(tmp_path, tmp_path, class_getter=["json", "lambda j: j['label']"], sample_classes=[1],
                   class_dropout=0.0, autoencoder_checkpoint_path=str(MINI / "autoencoder.safetensors"))  # fmt: skip
    tars = imported(write_records(tmp_path / "records", records), tmp_path / "tars", given)
    ((batch, told),) = run(given | {"webdataset_path": str(tars)})
    assert batch.images is None
    assert sorted(told["labels"].tolist()) == [i % CLASSES for i in range(4)]
