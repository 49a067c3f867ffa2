"""Folders of records, as published caches are, become tars that a training reads as it reads a cache of its own."""

import importlib
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from families.nova.imports import imported_records
from tests.tools.test_cache_reuse import members
from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from tools import build_dataset, cache
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "train" / "train_nova.py"
MINI = ROOT / "models" / "mini"
OF_CLIPS = {
    "model_version": "mini-video", "num_frames": 5, "motion_column": "flow",
    "autoencoder_checkpoint_path": str(MINI / "video_autoencoder.safetensors"),
}  # fmt: skip


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def entry(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def message(value: Any) -> bytes:
    """A feature, as Protocol Buffers have it."""
    if isinstance(value, dict):
        return entry(5, mapping(value))
    if isinstance(value, list):
        return entry(4, b"".join(entry(1, message(one)) for one in value))
    if isinstance(value, float):
        return varint(2 << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(3 << 3) + varint(value)
    return entry(1, value if isinstance(value, bytes) else value.encode())


def mapping(values: dict[str, Any]) -> bytes:
    return b"".join(entry(1, entry(1, name.encode()) + entry(2, message(value))) for name, value in values.items())


def kind(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: kind(one) for name, one in value.items()}
    return ["INT64"] if isinstance(value, list) else {bytes: "BYTES", str: "STRING", float: "FLOAT32", int: "INT64"}[
        type(value)
    ]  # fmt: skip


def write_records(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    contents = [mapping(record) for record in records]
    ends = np.cumsum([0, *map(len, contents)])
    about = {"entries": len(records), "features": kind(records[0]), "version": 1}
    (folder / "METADATA").write_text(json.dumps(about), encoding="utf-8")
    lines = (f"{end} {len(content)}\n" for end, content in zip(ends.tolist(), contents, strict=False))
    (folder / "00000.index").write_text("".join(lines), encoding="utf-8")
    (folder / "00000.data").write_bytes(b"".join(contents))
    return folder


def record(moments: np.ndarray, **further: Any) -> dict[str, Any]:
    return {"moments": moments.astype(np.float16).tobytes(), "shape": list(moments.shape), **further}


def settings(home: Path, data: Path, **changes: Any) -> dict[str, Any]:
    usual = {
        "updates": 2, "save_every": 2, "image_size": 32, "num_frames": 1, "crop_mode": "center", "latent": "mean",
        "model_version": "mini", "sample_prompts": ["x"], "sample_count": 1, "sample_groups": 1, "sample_steps": 1,
        "autoencoder_checkpoint_path": str(MINI / "autoencoder.safetensors"), "ema_start_iters": None,
        "text_encoder_checkpoint_path": str(MINI / "t5.safetensors"), "loss_repeat": 1,
    }  # fmt: skip
    made = (
        tiny_settings(home, data, **usual, **changes)
        if not changes
        else tiny_settings(home, data, **(usual | changes))
    )
    del made["ema_beta"]
    return made


def imported(folder: Path, out: Path, of_training: dict[str, Any]) -> Path:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(of_training), encoding="utf-8")
    build_dataset.main([str(folder), str(out), "--records", "--for", str(SCRIPT), str(config)])
    return out


def losses(of_training: dict[str, Any], data: Path, run: str) -> list[float]:
    case = importlib.import_module("train.train_nova").TrainNova
    given = of_training | {"webdataset_path": str(data), "experiment_id": run}
    assert case(make_config(case.Config, given)).run() == 0
    return [line["loss"] for line in read_metrics(given)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Any], Path]:
    """A folder of records, settings of a training, and our own cache of the same moments and texts."""
    home = tmp_path_factory.mktemp("records")
    of_training = settings(home, write_shard(home / "data" / "a.tar", 8, (32, 32)))
    config = home / "ours.yaml"
    config.write_text(yaml.safe_dump(of_training), encoding="utf-8")
    cache.main([str(SCRIPT), str(config), str(home / "ours"), "--dtype", "float16", "--features", "latents"])
    found = members(home / "ours" / "a.tar")
    records = []
    for number in range(8):
        moments = np.load(io.BytesIO(found[f"{number:05d}.moments.npy"]))
        caption = found[f"{number:05d}.txt"].decode()
        records.append(record(moments[:, 0], caption=caption, text="short" * (number % 2), flow=0.5 * number))
    return write_records(home / "records", records), of_training, home / "ours"


def test_a_training_reads_records_as_it_reads_its_own_cache(made, tmp_path, capsys):
    folder, of_training, ours = made
    out = imported(folder, tmp_path / "out", of_training | {"processes": 8})  # that will train
    told = capsys.readouterr().out
    assert "imported moments of 8 records in 1 tar" in told
    assert "left out 0" in told
    expected, found = members(ours / "a.tar"), members(out / "00000.tar")
    for number in range(8):
        for member in ("moments.npy", "txt"):
            assert found[f"{number:08d}.{member}"] == expected[f"{number:05d}.{member}"]
        fields = {"flow": 0.5 * number, "text": "short" if number % 2 else f"picture {number}"}
        assert json.loads(found[f"{number:08d}.json"]) == fields
    run = of_training | {"lanes": 1, "micro_batch_size": 4, "checkpoint_path": str(tmp_path)}
    assert len(losses(run, out, "theirs")) == 2
    other, content = tmp_path / "other.safetensors", (MINI / "autoencoder.safetensors").read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="the weights of the autoencoder network"):
        losses(run | {"autoencoder_checkpoint_path": str(other)}, out, "other")
    short = {"captions_getter": [["txt", "json.text"], "lambda caption, text: [caption, text]"]}
    assert len(losses(run | short, out, "short")) == 2


@pytest.mark.slow
def test_clips_come_with_frames_motion_and_states_of_their_texts(made, tmp_path, capsys):
    random, of_training = (
        np.random.default_rng(0),
        made[1] | OF_CLIPS | {"frame_stride": 2, "captions_getter": ["key", "identity"]},
    )
    states = random.normal(size=(3, 64)).astype(np.float16)
    text = {"data": states.tobytes(), "shape": [3, 64]}
    records = [record(random.normal(size=(32, 2, 4, 4)), caption=text, text=text, flow=float(i), codes=[1, 2])
               for i in range(4)]  # fmt: skip
    out = imported(write_records(tmp_path / "records", records), tmp_path / "out", of_training)
    told = capsys.readouterr().out
    assert "imported moments, text of 4 records" in told
    assert "not taken, as nothing here reads it: codes of 4 records" in told
    assert "nothing here reads it: states of a short text, beside those of a caption of 4 records" in told
    found = members(out / "00000.tar")
    facts = {"width": 32, "height": 32, "crops": [[0, 0]], "num_frames": 9, "fps": 24.0}
    assert json.loads(found["00000003.picture.json"]) == facts
    assert np.array_equal(np.load(io.BytesIO(found["00000003.text.npy"])), states)
    assert len(losses(of_training | {"checkpoint_path": str(tmp_path)}, out, "clips")) == 2


def without(folder: Path, *names: str) -> None:
    about = json.loads((folder / "METADATA").read_text(encoding="utf-8"))
    (folder / "METADATA").write_text(json.dumps(about | {"features": {
        name: one for name, one in about["features"].items() if name not in names
    }}), encoding="utf-8")  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "00000.data").write_bytes((folder / "00000.data").read_bytes()[:-9]),
         r"00000\.data is cut off: it has \d+ bytes, and 00000.index a record that ends at \d+"),
        (lambda folder: (folder / "00000.index").write_bytes((folder / "00000.index").read_bytes()[:-10]),
         "00000.index is"),
        (lambda folder: without(folder, "flow"), "it has 'flow', of which METADATA knows nothing"),
        (lambda folder: shutil.rmtree(folder), "is not a folder of records"),
        (lambda folder: (folder / "METADATA").unlink(), "is no folder of records"),
    ],
)  # fmt: skip
def test_a_folder_that_is_damaged_becomes_no_tars(made, tmp_path, damage, message):
    folder, of_training, _ = made
    damage(shutil.copytree(folder, tmp_path / "records"))
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "records", tmp_path / "out", of_training)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"shape": 4}, "shape"), ({"caption": 3, "text": b"x"}, "caption, text"), ({"caption": {"x": 3}}, "caption"),
        ({"text": [1]}, "text"), ({"flow": "much"}, "flow"), ({"moments": "abc"}, "moments"),
    ],
)  # fmt: skip
def test_features_of_another_type_are_named(tmp_path, changes, wrong):
    folder = write_records(tmp_path / "records", [record(np.zeros((32, 2, 2)), caption="a") | changes])
    with pytest.raises(UserError, match=f"METADATA has {wrong} of another type than NOVA's caches"):
        list(imported_records(folder))


def test_a_motion_score_that_is_no_number_leaves_its_record_out(tmp_path):
    folder = write_records(tmp_path / "records", [record(np.zeros((32, 2, 2)), caption="a", flow=float("nan"))])
    assert [one.problem for one in imported_records(folder)] == ["its flow is not finite"]


def test_states_of_a_text_beside_a_caption_are_no_text_of_it(tmp_path):
    text = {"data": np.zeros(64, np.float16).tobytes(), "shape": [1, 64]}
    folder = write_records(tmp_path / "records", [record(np.zeros((32, 2, 2)), caption="One. Two.", text=text)])
    (found,) = imported_records(folder)
    assert json.loads(found.members["json"]) == {"text": "One."}
    assert found.not_taken == ["states of a short text, beside those of a caption"]
    folder = write_records(tmp_path / "others", [record(np.zeros((32, 2, 2)), caption=text, text="short")])
    assert [one.not_taken for one in imported_records(folder)] == [["text, beside states of a caption"]]


@pytest.mark.slow
def test_other_features_and_sizes_are_named(made, tmp_path, capsys):
    of_training, pictures = made[1], np.zeros((32, 2, 2))
    folder = write_records(tmp_path / "without", [{"codes": b"1", "caption": "a"}])
    with pytest.raises(UserError, match="METADATA has the features codes, caption, but moments and shape is missing"):
        imported(folder, tmp_path / "out", of_training)
    strange = [record(pictures, flow=1.0), record(np.zeros((32, 2, 3)), flow=1.0), record(np.zeros(8), flow=1.0),
               record(np.full((32, 2, 2), np.inf), flow=1.0)]  # fmt: skip
    imported(write_records(tmp_path / "strange", strange), tmp_path / "some", of_training)
    told = capsys.readouterr().out
    assert "imported moments of 1 record in 1 tar" in told
    assert "no caption: 1" in told
    assert "1 its moments are of shape [32, 1, 2, 3], where the config wants [32, 1, 2, 2] for" in told
    assert "1 its moments are of shape [8], neither of a picture nor of a clip: record 2" in told
    assert "1 its moments hold numbers that are not finite: record 3" in told
    with pytest.raises(UserError, match=r"holds no record that can be used: left out 3"):
        imported(write_records(tmp_path / "none", strange[1:]), tmp_path / "none_out", of_training)
    with pytest.raises(UserError, match="do not say which autoencoder network made them: name it, autoencoder_check"):
        imported(folder.with_name("strange"), tmp_path / "out", of_training | {"autoencoder_checkpoint_path": None})
    with pytest.raises(SystemExit):
        build_dataset.main([str(folder), str(tmp_path / "out"), "--records", "--import", "npz"])
    with pytest.raises(UserError, match=r"--records, and --for SCRIPT CONFIG .* belong together"):
        build_dataset.main([str(folder), str(tmp_path / "out"), "--records"])
