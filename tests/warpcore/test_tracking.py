"""wandb (offline) and TensorBoard show what was logged, also over a restart."""

import io
import json
import logging
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from warpcore import tracking
from warpcore.clips import encode_mp4

PICTURE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
CLIP = np.stack([PICTURE, PICTURE + 80, PICTURE + 40])


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def start(folder, *, project=None, tensorboard=False, resume_update=None):
    return tracking.make_tracker(
        wandb_project=project,
        wandb_entity=None,
        tensorboard=tensorboard,
        folder=folder,
        run_id="run1",
        config={"lr": 1e-4, "captions_getter": ["txt", "identity"]},
        resume_update=resume_update,
    )


def events(folder):
    kinds = ("scalars", "images", "tensors")
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    return accumulator.Reload()


def wandb_records(folder):
    """The records of the newest offline run: LevelDB's log format, each a protobuf message."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # as at the end of a program: waits for wandb's own process, which writes the file
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, offset, body, records = path.read_bytes(), 7, b"", []
    while offset < len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        body += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(body))
            body = b""
    return records


def wandb_history(folder):
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                rows[-1][name] = json.loads(item.value_json)
    return rows


def test_tensorboard_shows_scalars_pictures_and_alerts(tmp_path):
    tracker = start(tmp_path, tensorboard=True)
    for update in (1, 2, 3):
        tracker.log(update, {"loss": 1 / update, "lr": 1e-4})
    tracker.images(3, "samples", PICTURE, "a red square")
    tracker.clip(3, "clips", CLIP, 4.0, "a red square turns")
    tracker.alert("Loss is not finite", "update 3 was skipped")
    tracker.close()
    shown = events(tmp_path)
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (update, pytest.approx(1 / update)) for update in (1, 2, 3)
    ]
    (picture,) = shown.Images("samples")
    assert picture.step == 3
    assert np.array_equal(np.array(Image.open(io.BytesIO(picture.encoded_image_string))), PICTURE)
    moving = Image.open(io.BytesIO(shown.Images("clips")[0].encoded_image_string))
    assert (moving.format, moving.n_frames, moving.size, moving.info["duration"]) == ("GIF", 3, (6, 8), 250)
    texts = {tag: shown.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in shown.Tags()["tensors"]}
    assert texts["samples/caption/text_summary"] == "a red square"
    assert "update 3 was skipped" in texts["alerts/text_summary"]
    assert '"captions_getter"' in texts["config/text_summary"]


def test_tensorboard_forgets_what_lies_beyond_the_checkpoint(tmp_path):
    tracker = start(tmp_path, tensorboard=True)
    for update in range(1, 8):
        tracker.log(update, {"loss": 1.0})
    tracker.close()
    tracker = start(tmp_path, tensorboard=True, resume_update=4)
    for update in (5, 6):
        tracker.log(update, {"loss": 2.0})
    tracker.close()
    shown = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]


@pytest.mark.integration
def test_wandb_offline_writes_steps_pictures_config_and_alerts(tmp_path):
    tracker = start(tmp_path, project="demo")
    tracker.log(1, {"loss": 2.0})
    tracker.log(2, {"loss": 1.5, "lr": 1e-4})
    tracker.images(2, "samples", PICTURE, "a red square")
    tracker.clip(2, "clips", CLIP, 4.0, "a red square turns")
    tracker.alert("Loss is not finite", "update 3 was skipped")
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    rows = {row["_step"]: row for row in wandb_history(tmp_path)}
    assert {step: row["loss"] for step, row in rows.items()} == {1: 2.0, 2: 1.5, 3: 1.0}
    assert rows[2]["lr"] == 1e-4
    assert rows[2]["samples/caption"] == "a red square"
    (written,) = tmp_path.glob(f"wandb/offline-run-*/files/{rows[2]['samples/path']}")
    assert np.array_equal(np.array(Image.open(written)), PICTURE)
    (video,) = tmp_path.glob(f"wandb/offline-run-*/files/{rows[2]['clips/path']}")
    assert video.read_bytes() == encode_mp4(CLIP, 4.0)
    records = {record.WhichOneof("record_type"): record for record in wandb_records(tmp_path)}
    assert records["alert"].alert.text == "update 3 was skipped"
    assert (records["run"].run.run_id, records["run"].run.project) == ("run1", "demo")
    assert {item.key for item in records["run"].run.config.update} >= {"lr", "captions_getter"}


class Run:
    """Stands for a run that wandb's server knows up to step 5."""

    step = 6

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def test_a_resumed_wandb_run_logs_no_step_twice(tmp_path, monkeypatch):
    import wandb

    run, asked = Run(), {}
    monkeypatch.setattr(wandb, "init", lambda **what: asked.update(what) or run)
    tracker = start(tmp_path, project="demo", resume_update=3)
    for update in (4, 5, 6, 7):
        tracker.log(update, {"loss": float(update)})
    assert run.logged == [(6, {"loss": 6.0}), (7, {"loss": 7.0})]
    assert (asked["id"], asked["resume"]) == ("run1", "allow")


@pytest.mark.integration
def test_wandb_without_a_network_goes_on_offline_and_says_so(tmp_path, monkeypatch, caplog):
    import wandb

    init = wandb.init

    def unreachable(mode=None, **what):
        if mode != "offline":
            raise wandb.errors.CommError("connection refused")
        return init(mode=mode, **what)

    monkeypatch.setattr(wandb, "init", unreachable)
    with caplog.at_level(logging.WARNING):
        tracker = start(tmp_path, project="demo")
    assert "(connection refused). The run goes on offline; upload it later with `wandb sync" in caplog.text
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert [row["loss"] for row in wandb_history(tmp_path)] == [2.0]


def test_a_tracker_that_fails_is_reported_and_the_run_goes_on(caplog):
    class Broken(tracking.Tracker):
        def log(self, update, scalars):
            raise OSError("disk full")

    class Working(tracking.Tracker):
        updates = ()

        def log(self, update, scalars):
            self.updates += (update,)

    working = Working()
    tracker = tracking.Trackers([Broken(), working])
    tracker.log(1, {})
    tracker.log(2, {})
    assert working.updates == (1, 2)
    assert caplog.text.count("disk full") == 1


def test_no_tracker_needs_no_folder(tmp_path):
    tracker = start(tmp_path / "nowhere")
    tracker.log(1, {"loss": 1.0})
    tracker.images(1, "samples", PICTURE)
    tracker.alert("a", "b")
    tracker.close()
    assert not (tmp_path / "nowhere").exists()
