"""REPA and TREAD in a training: what is minimised, exported, cached, kept when it is resumed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.common.techniques.config import TechniqueSettings
from families.common.techniques.transformer import PROJECTOR
from tests.caches import make_cache, write_pictures
from tests.warpcore.runs import numbers, read_metrics
from train.train_dit import TrainDit
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

TOWER = Path(__file__).parents[4] / "models" / "mini" / "image_tower.safetensors"
REPA = {"encoder": str(TOWER), "projector_width": 16}


@pytest.fixture
def settings(tmp_path):
    """Of a small DiT on pictures of two sizes."""
    data = write_pictures(tmp_path / "pictures" / "0.tar", 12)
    return {
        "experiment_id": "plain", "checkpoint_path": str(tmp_path / "runs"), "webdataset_path": str(data.parent),
        "model_version": "mini", "num_classes": 7, "class_getter": ["json", "lambda j: j['score'] % 7"],
        "learn_sigma": False, "updates": 2, "save_every": 2, "batch_size": 2, "image_size": 64, "num_workers": 0,
        "multi_aspect_ratio": [1, 2], "device": "cpu", "lr": 0.01, "log_every": 1, "seed": 3, "crop_mode": "center",
        "sample_steps": 1, "sample_count": 1, "validation_samples": 2, "ema_start_iters": 1, "ema_beta": 0.5,
    }  # fmt: skip


def train(settings: dict, kind: type[TrainDit] = TrainDit) -> list[dict]:
    assert kind(make_config(kind.Config, settings)).run() == 0
    return read_metrics(settings)


def exported(settings: dict) -> dict[str, dict[str, torch.Tensor]]:
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"]
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.bits
def test_the_loss_has_the_alignment_beside_the_denoising_loss_and_the_export_has_no_projector(settings):
    plain, aligned = train(settings), train(settings | {"experiment_id": "repa", "repa": REPA})
    for line in aligned:
        assert line["loss"] == pytest.approx(line["raw_loss"] + 0.5 * line["alignment"], rel=1e-5)
        assert -1 <= line["alignment"] <= 1
    assert aligned[0]["raw_loss"] == plain[0]["raw_loss"]  # the same weights, the same draws
    assert aligned[1]["raw_loss"] != plain[1]["raw_loss"]
    assert "validation_alignment" in aligned[-1]
    assert "alignment" not in plain[0]
    ours, theirs = exported(settings | {"experiment_id": "repa"}), exported(settings)
    assert ours.keys() == theirs.keys() == {"generator", "generator_ema"}
    assert all(ours[name].keys() == theirs[name].keys() for name in ours)


@pytest.mark.parametrize("tread", [None, {"start": 0, "end": 4}])
def test_a_mask_and_the_weight_of_a_prior_count_for_the_alignment(settings, tread):
    expected, own = [], settings["webdataset_path"]
    prior = write_pictures(Path(own).parent / "prior" / "0.tar", 4, first=20)

    class Recorded(TrainDit):
        def loss(self, inputs, random):
            projector, made = self.networks[PROJECTOR], []
            handle = projector.register_forward_hook(lambda module, inputs, output: made.append(output))
            losses = super().loss(inputs, random)
            handle.remove()
            if self.networks["generator"].training:
                mask = F.interpolate(self.mask, inputs[0].shape[2:], mode="area").flatten(1)  # a position is a token
                patches, count = self.patches, made[0].shape[1]
                if tread:
                    noise = random.normal("token routing", patches.shape[1])
                    kept = noise.argsort(dim=1)[:, :count].sort(dim=1).values
                    rows = torch.arange(len(kept))[:, None]
                    patches, mask = patches[rows, kept], mask[rows, kept]
                cosine = F.cosine_similarity(made[0], patches, dim=2)
                of_sample = -(cosine * mask).sum(dim=1) / mask.sum(dim=1)
                torch.testing.assert_close(losses.metrics["alignment"], of_sample.detach(), rtol=1e-4, atol=1e-5)
                expected.append((losses.loss - self.sample_weight * (losses.raw + 0.5 * of_sample)).abs().max())
            return losses

    given = {"masked_loss": True, "prior_path": str(prior.parent), "prior_weight": 0.25, "updates": 3}
    train(settings | given | {"repa": REPA, "tread": tread, "validation_samples": 0}, Recorded)
    assert len(expected) == 3
    assert max(expected) < 1e-4


def test_patches_from_a_cache_are_those_of_the_run_and_no_encoder_is_built(settings, tmp_path):
    given = settings | {"repa": REPA, "updates": 3, "save_every": 3, "latent": "mean"}
    out = make_cache("train_dit", given, tmp_path / "cache", "--features", "latents", "--dtype", "float32")
    cached = given | {"webdataset_path": str(out), "experiment_id": "cached"}

    class Watched(TrainDit):
        def loss(self, inputs, random):
            assert "repa" not in self.networks
            return super().loss(inputs, random)

    for ours, theirs in zip(train(cached, Watched), train(given), strict=True):
        assert ours["samples_hash"] == theirs["samples_hash"]
        for name in ("loss", "alignment"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_cache_without_patches_or_of_another_encoder_is_refused_with_the_command(settings, tmp_path):
    out = make_cache("train_dit", settings, tmp_path / "cache", "--features", "latents")
    cached = settings | {"webdataset_path": str(out), "experiment_id": "cached"}
    with pytest.raises(UserError, match=r"it has no patches, but moments.* python3 tools/cache\.py"):
        train(cached | {"repa": REPA})
    with_patches = make_cache(
        "train_dit", settings | {"repa": REPA}, tmp_path / "with_patches", "--features", "latents"
    )
    train(cached | {"webdataset_path": str(with_patches)})  # without the technique, the moments alone are read
    copied = tmp_path / "other.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(TOWER).items()}
    with safe_open(TOWER, "pt") as file:
        save_file(tensors, copied, file.metadata())
    with pytest.raises(UserError, match=r"the weights of the repa network are image_tower\.safetensors"):
        train(cached | {"webdataset_path": str(with_patches), "repa": REPA | {"encoder": str(copied)}})


@pytest.mark.bits
def test_a_run_in_two_halves_is_the_run_in_one(settings):
    given = settings | {"repa": REPA, "tread": True, "updates": 4, "lr_schedule": "constant"}
    whole = train(given | {"experiment_id": "whole"})
    train(given | {"updates": 2})
    assert numbers(train(given)) == numbers(whole)
    with pytest.raises(UserError, match=r"is of another model: ema/repa_projector.* is only in the checkpoint"):
        train(given | {"repa": None, "updates": 5})


@pytest.mark.bits
def test_tread_changes_updates_but_neither_validation_nor_drawings(settings):
    train(settings)  # a new network's blocks do nothing
    start = Path(settings["checkpoint_path"]) / "plain" / "generator.safetensors"
    given = settings | {"generator_checkpoint_path": str(start), "lr": 1e-30, "updates": 1, "save_every": 1}
    runs = {"all": None, "routed": {"share": 0.75}}
    lines = {name: train(given | {"experiment_id": name, "tread": tread})[0] for name, tread in runs.items()}
    assert lines["all"]["validation_loss"] == lines["routed"]["validation_loss"]
    assert lines["all"]["loss"] != lines["routed"]["loss"]
    drawn = [Path(given["checkpoint_path"]) / name / "samples" / "00000001.png" for name in runs]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_a_key_has_a_short_form_and_mistakes_in_it_are_named():
    assert TechniqueSettings(repa=True, tread=False).repa.weight == 0.5
    assert TechniqueSettings(repa=False, tread={"share": 0.25}).tread.share == 0.25
    assert TechniqueSettings(repa=False).repa is None
    for given, message in (
        ({"repa": {"block": 0}}, r"repa\.block: found 0, but input should be greater than 0 \(expected: int\)"),
        ({"repa": {"blok": 1}}, r"repa\.blok: unknown key"),
        ({"tread": {"share": 1}}, r"tread\.share: found 1, but input should be less than 1"),
        ({"tread": "yes"}, "tread: found 'yes', but a mapping with keys of its own is needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(TechniqueSettings, given)
