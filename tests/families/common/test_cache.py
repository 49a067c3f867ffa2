"""Training from a cache is training from pictures; what a run can't use is refused by name."""

import importlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common.features import Origin
from modules.clip import ClipSettings, TextTower
from tests.caches import make_cache, write_pictures
from tests.faulty_proxy import FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from tests.tiers import represented_by
from tests.warpcore.runs import load_weights, numbers, read_metrics
from warpcore.config import make_config
from warpcore.core import WarpCore
from warpcore.data import s3_requests
from warpcore.data.storage_protocol import StorageError
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

SCRIPTS: dict[str, dict] = {
    "train_c": {"clip_image_dropout": 0.5, "offset_noise": 0.1},
    "train_c_lora": {"module_filters": [".attn"], "rank": 2, "masked_loss": True, "prior_weight": 0.5},
    "train_b": {"effnet_scale": [0.5, 1.0], "generator_checkpoint_path": None, "clip_image_dropout": None},
}


def use_case(script: str) -> type[WarpCore]:
    module = importlib.import_module(f"train.{script}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return next(kind for kind in own if issubclass(kind, WarpCore))


def train(script: str, settings: dict, **changes) -> list[dict]:
    run = use_case(script)(make_config(use_case(script).Config, settings | changes))
    assert run.run() == 0
    return read_metrics(settings | changes)


@pytest.fixture
def settings(small_cascade, tmp_path):
    """Of a script, for a data set of two folders, two buckets and three epochs."""
    for folder, first in (("one", 0), ("two", 8)):
        write_pictures(tmp_path / "pictures" / folder / "0.tar", 8, first)
    common = small_cascade | {
        "webdataset_path": str(tmp_path / "pictures"), "multi_aspect_ratio": [1, 2], "batch_size": 2, "updates": 14,
        "log_every": 1, "save_every": 14, "validation_samples": 3, "crop_mode": "center", "sample_steps": 2,
        "sample_count": 2, "seed": 5, "dataset_filters": [["score", "lambda s: s != 3"]],
    }  # fmt: skip

    def of(script: str, **changes) -> dict:
        every = common | SCRIPTS[script] | changes
        return {key: value for key, value in every.items() if value is not None}

    return of


def assert_same(from_cache: list[dict], from_pictures: list[dict], tolerance: float) -> None:
    assert len(from_cache) == len(from_pictures) > 0
    for line, other in zip(from_cache, from_pictures, strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line.keys() == other.keys()
        for name in line.keys() & {"loss", "validation_loss"}:
            assert line[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("script", represented_by("train_c", of=SCRIPTS))
def test_a_run_from_a_cache_is_the_run_from_pictures(settings, script, tmp_path):
    given, cached = settings(script), {"webdataset_path": str(tmp_path / "cache"), "experiment_id": "cached"}
    if script == "train_b":
        given["effnet_scale"] = [1, 1]  # a random scale of each draw is part of a crop, like its place
    if script == "train_c_lora":  # samples of the prior are known by their tars, here as there
        one, two = ("pictures/one", "pictures/two")
        given |= {"webdataset_path": str(tmp_path / one), "prior_path": str(tmp_path / two)}
        cached |= {"webdataset_path": str(tmp_path / "cache/one"), "prior_path": str(tmp_path / "cache/two")}
    make_cache(script, given, tmp_path / "cache", "--dtype", "float32")
    assert_same(train(script, given | cached), train(script, given), 1e-5)
    assert len(list(Path(given["checkpoint_path"]).glob("*/samples/00000014.png"))) == 2


@pytest.mark.parametrize("script", represented_by("train_b", of=SCRIPTS))
def test_the_first_crop_is_that_of_the_first_epoch(settings, script, tmp_path):
    """Random crops, and random scales of what Stage B sees, are those of a run from pictures with the same seed."""
    given = settings(script, crop_mode="random", updates=6, save_every=6, validation_samples=0)
    out = make_cache(script, given, tmp_path / "cache", "--dtype", "float32")
    assert_same(train(script, given, webdataset_path=str(out), experiment_id="cached"), train(script, given), 1e-5)


@pytest.mark.slow
def test_half_precision_costs_little(settings, tmp_path, capsys):
    given = settings("train_c", updates=4, save_every=4, validation_samples=0)
    from_pictures = train("train_c", given)
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2)):
        out = make_cache("train_c", given, tmp_path / dtype, "--dtype", dtype)
        told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  latent: "))
        assert 0 < float(told.split()[-2]) / 100 < tolerance, "the error that is told, relative to the latents"
        assert_same(train("train_c", given, webdataset_path=str(out), experiment_id=dtype), from_pictures, tolerance)


@pytest.mark.slow
def test_each_draw_takes_one_of_the_crops_by_its_seed(settings, tmp_path):
    given = settings("train_c", crop_mode="random", updates=14, validation_samples=0)
    out = make_cache("train_c", given, tmp_path / "cache", "--variants", "3", "--dtype", "float32")
    stored, seen = {}, {}
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension.startswith("latent"):
                    stored.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert all(sorted(crops) == ["latent.1.npy", "latent.2.npy", "latent.npy"] for crops in stored.values())
    assert any(len(set(crops.values())) == 3 for crops in stored.values())

    class Watched(use_case("train_c")):
        def encode(self, batch, random):
            latents, conditions = super().encode(batch, random)
            for key, latent in zip(batch.keys, latents, strict=True):
                content = latent.numpy().tobytes()
                seen.setdefault(key, []).append(next(crop for crop, file in stored[key].items() if content in file))
            return latents, conditions

    cached = given | {"webdataset_path": str(out)}
    for experiment in ("a", "b"):
        assert Watched(make_config(Watched.Config, cached | {"experiment_id": experiment})).run() == 0
    assert {crop for crops in seen.values() for crop in crops} == {"latent.npy", "latent.1.npy", "latent.2.npy"}
    assert all(crops[: len(crops) // 2] == crops[len(crops) // 2 :] for crops in seen.values())


@pytest.mark.slow
@pytest.mark.bits
def test_a_cache_needs_no_index_and_works_on_s3(settings, tmp_path, bucket):
    given = settings("train_c", updates=4, save_every=4, validation_samples=0)
    out = make_cache("train_c", given, tmp_path / "cache")
    here = given | {"webdataset_path": str(out), "experiment_id": "here"}
    lines = train("train_c", here)
    for path in [*out.rglob("*.parquet"), *out.rglob("*.tar.cache.json")]:
        path.unlink()
    url = bucket.upload(out, "cache/")
    there = numbers(train("train_c", given, webdataset_path=url, experiment_id="there"))
    assert there == numbers(lines)


def test_a_storage_that_does_not_answer_is_not_told_as_a_damaged_cache(bucket, monkeypatch):
    def told(folder: str) -> str:
        with pytest.raises(StorageError) as error:
            Origin.read(folder)
        return str(error.value)

    cache = f"{bucket.url}/cache"
    assert Origin.read(cache) is None
    assert "there is no such bucket" in told("s3://another/cache")
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        proxy.refused = ("GET", "HEAD")
        assert "403" in told(cache)
    monkeypatch.setattr(s3_requests, "CALL_ATTEMPTS", 1)
    talk_to("http://127.0.0.1:1", monkeypatch)
    assert "Could not connect to the endpoint" in told(cache)


@pytest.mark.slow
def test_a_damaged_member_is_a_bad_sample(settings, tmp_path, capfd):
    given = settings("train_c", updates=8, save_every=8, validation_samples=0)
    out = make_cache("train_c", given, tmp_path / "cache")
    path = out / "one" / "0.tar"
    with tarfile.open(path) as tar:
        place = tar.getmember("00005.clip_text.npy").offset_data
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"junk")
    train("train_c", given, webdataset_path=str(out))
    assert "00005.clip_text.npy: it holds no tensor" in capfd.readouterr().err


def refusal(script: str, settings: dict, **changes) -> str:
    with pytest.raises(UserError) as error:
        train(script, settings | changes)
    return str(error.value)


def test_a_cache_made_otherwise_is_refused_by_name(settings, tmp_path, monkeypatch):
    given = settings("train_c", clip_image_dropout=1.0)
    out = make_cache("train_c", given, tmp_path / "cache")
    cached = given | {"webdataset_path": str(out)}
    assert "crop_mode is 'center' in the cache, 'random' here" in refusal("train_c", cached, crop_mode="random")
    assert "(image_size, multi_aspect_ratio)" in refusal("train_c", cached, multi_aspect_ratio=[1])
    assert "captions_getter" in refusal("train_c", cached, captions_getter=["json", "lambda j: j['score']"])
    assert "background" in refusal("train_c", cached, background=[0, 0, 0])
    assert "it has no clip_img" in refusal("train_c", cached, clip_image_dropout=0.9)
    assert "it has no stage_a" in refusal("train_b", settings("train_b", webdataset_path=str(out)))
    assert "bucketeer_random_ratio" in refusal("train_c", cached, bucketeer_random_ratio=0.5)
    mixed = [str(out), str(tmp_path / "pictures")]
    assert "name caches or pictures, not both" in refusal("train_c", cached, webdataset_path=mixed)
    assert "not both" in refusal("train_c", cached | {"validation_samples": 0}, validation_path=mixed[1])
    hidden = tmp_path / "above"
    hidden.mkdir()
    (hidden / "link").symlink_to(out)
    assert "needs the pictures themselves" in refusal("train_c", cached, webdataset_path=str(hidden))
    only = {key: value for key, value in cached.items() if key in use_case("train_encoder").Config.model_fields}
    assert "needs the pictures themselves" in refusal("train_encoder", only)
    control = {"controlnet_blocks": [1], "controlnet_filter": "InpaintFilter"}
    assert "ControlNet's condition is made of pictures" in refusal("train_c_controlnet", cached | control)
    b = settings("train_b")
    out_b = make_cache("train_b", b, tmp_path / "cache_b")
    assert "effnet_scale is [0.5, 1.0] in the cache" in refusal(
        "train_b", b, webdataset_path=str(out_b), effnet_scale=[1, 1]
    )
    assert "train_encoder" in refusal("train_b", b, webdataset_path=str(out_b), train_encoder=True)
    encoder = {key: tensor + 1 for key, tensor in load_file(tmp_path / "effnet_encoder.safetensors").items()}
    save_file(encoder, tmp_path / "other.safetensors")
    message = refusal("train_c", cached, effnet_checkpoint_path=str(tmp_path / "other.safetensors"))
    assert "the weights of the encoder network are effnet_encoder.safetensors (SHA-256" in message
    assert "other.safetensors" in message
    marker = json.loads((out / "cache.json").read_text())
    (out / "cache.json").write_text(json.dumps(marker | {"version": 0}))
    assert "is not of version" in refusal("train_c", cached)
    (out / "cache.json").write_text("{")
    assert "is incomplete" in refusal("train_c", cached)


def forget_the_tokenizer(out: Path) -> None:
    """Make a cache what it was before caches named their tokenizer."""
    for path in out.rglob("cache.json"):
        about = json.loads(path.read_text())
        assert about["settings"].pop("token_ids") == "clip"
        path.write_text(json.dumps(about))


@pytest.mark.integration
def test_a_cache_of_other_token_ids_is_refused_where_a_caption_has_others(settings, tmp_path):
    text = TextTower(ClipSettings(embed_dim=40, text_cfg={"width": 48, "heads": 4, "layers": 1, "context_length": 8}))
    text.save(tmp_path / "pairs.safetensors")
    for name, caption in (("plain", "a dog w{}"), ("odd", "the dog’s w{}")):
        write_pictures(tmp_path / name / "0.tar", 4, caption=caption)
        given = settings(
            "train_c", clip_text_model_name=str(tmp_path / "pairs.safetensors"), updates=2, save_every=2,
            webdataset_path=str(tmp_path / name), validation_samples=0, dataset_filters=[], experiment_id=name,
        )  # fmt: skip
        cached = given | {"webdataset_path": str(make_cache("train_c", given, tmp_path / f"{name}_cache"))}
        forget_the_tokenizer(Path(cached["webdataset_path"]))
        if name == "plain":
            train("train_c", cached)
            about = json.loads((tmp_path / f"{name}_cache" / "cache.json").read_text())
            assert about["settings"]["token_ids"] == "clip", "it is looked at once"
        else:
            assert "token_ids is 'open_clip' in the cache, 'clip' here" in refusal("train_c", cached)
            with pytest.raises(UserError, match="holds another cache: token_ids"):
                make_cache("train_c", given, tmp_path / f"{name}_cache")


def test_a_cache_of_other_weights_is_refused_for_every_feature(settings, tmp_path):
    """Also for what only depends on a network, such as the size of a mask, and for a network that it does not name."""
    about = Origin(
        features={"latent": [], "latent_mask": []}, makers={"latent": "encoder", "latent_mask": None},
        networks={"encoder": {"file": "a", "sha256": "0"}}, settings={},
        dtype="float16", variants=1, seed=0, shapes={},
    )  # fmt: skip
    run = replace(
        about,
        makers={"latent": "encoder", "latent_mask": "encoder"},
        networks={"encoder": {"file": "b", "sha256": "1"}},
    )
    assert "the weights of the encoder network are a" in about.differences(run, ["latent_mask"])[0]
    unnamed = replace(about, networks={})
    assert "does not say which weights the encoder network had" in unnamed.differences(run, ["latent_mask"])[0]
    for script in SCRIPTS:
        features = use_case(script)(make_config(use_case(script).Config, settings(script))).features
        assert all(feature.network for feature in features.values()), script


@pytest.mark.parametrize(
    "changing",
    [
        {"caption_templates": ["w1 {caption}", "w2 {caption}"]},
        {"train_tokens": [["[fernando]", "^picture</w>"]], "caption_templates": ["a [fernando]"], "lr": 1e-2},
    ],
    ids=["templates", "tokens"],
)
def test_texts_that_change_from_draw_to_draw_are_not_cached(settings, tmp_path, changing):
    given = settings("train_c_lora", masked_loss=False, **changing)
    out = make_cache("train_c_lora", given, tmp_path / "cache", "--dtype", "float32")
    assert set(json.loads((out / "cache.json").read_text())["features"]) == {"latent"}
    cached = train("train_c_lora", given, webdataset_path=str(out), experiment_id="cached")
    assert_same(cached, train("train_c_lora", given), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", represented_by("train_c", of=("train_b", "train_c")))
def test_remembered_texts_change_nothing(settings, script, capfd):
    given = settings(script, updates=20, save_every=20, validation_samples=0)
    lines = train(script, given)
    tower_calls = []

    class Counted(use_case(script)):
        def build(self):
            networks = super().build()
            networks["text"].model.transformer.register_forward_hook(lambda *_: tower_calls.append(self.update))
            return networks

    def run(name: str, **changes) -> dict:
        one = given | {"cache_text": True, "experiment_id": name} | changes
        tower_calls.clear()
        assert Counted(make_config(Counted.Config, one)).run() == 0
        # A text that is remembered was encoded at another place in its batch, where sums may round otherwise.
        assert_same(read_metrics(one), lines, 1e-5)
        for key, tensor in load_weights(given).items():
            torch.testing.assert_close(load_weights(one)[key], tensor, rtol=1e-3, atol=1e-3, msg=key)
        return one

    run("remembered")
    assert len([update for update in tower_calls if 12 <= update < 20]) <= 1
    assert "Raise cache_text_gb" not in capfd.readouterr().err
    run("bounded", cache_text_gb=1e-6)
    assert len([update for update in tower_calls if 12 <= update < 20]) > 4
    assert capfd.readouterr().err.count("Raise cache_text_gb") == 1


def test_remembered_texts_exclude_tokens_that_are_trained(settings):
    tokens = {"train_tokens": [["[fernando]", "^picture</w>"]], "cache_text": True}
    assert "what captions mean changes" in refusal("train_c_lora", settings("train_c_lora", **tokens))
