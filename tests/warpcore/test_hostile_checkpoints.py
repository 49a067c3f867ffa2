"""Checkpoints that anyone may have written: their state, their table of contents and the hashes of both."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tests.bounds import bounded
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore.checkpoint_table import TableError, read_table
from warpcore.errors import UserError
from warpcore.places import MANIFEST, fingerprint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with data and a run that has the checkpoints of the updates 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    write_shard(folder / "a.tar", 10)
    train_here(settings(folder, updates=4))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def settings(folder: Path, **changes) -> dict:
    return tiny_settings(folder, folder / "a.tar", save_every=2, **changes)


def replace(folder: Path, name: str, content: bytes) -> None:
    """Another content of a file of the newest checkpoint, with its hash in the manifest."""
    state = folder / "tiny" / "state" / "00000004"
    (state / name).write_bytes(content)
    manifest = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][name] = fingerprint(state / name)
    (state / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def with_value(folder: Path, place: str, value: object) -> bytes:
    values = json.loads((folder / "tiny" / "state" / "00000004" / "state.json").read_text(encoding="utf-8"))
    *outer, last = place.split("/")
    inner = values
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(values).encode()


DAMAGED = {
    "nothing": b"",
    "a list": b"[]",
    "too deep": b"[" * 100_000,
    "a long number": b"1" * 5000,
    "no UTF-8": b"\xff\xfe{}",
    "no values": b"{}",
}
WRONG = {
    "feed": [],
    "feed/lane_states": [],
    "feed/lane_states/x": {},
    "feed/lane_states/0": 3,
    "feed/lane_states/0/emitted": "1",
    "feed/lane_states/0/cursor": -1,
    "feed/lane_states/0/epoch": 10**18,
    "feed/lane_states/0/group": None,
    "feed/lane_states/0/counts": {"drawn": []},
    "feed/lane_states/0/waiting": {"axb": []},
    "feed/lane_states/0/waiting/16x16": [[1]],
    "feed/next_micro_batch": 1e300,
    "feed/micro_batch_size": 0,
    "feed/fingerprint": "x",
    "feed/bad_samples": None,
    "optimizer": None,
    "optimizer/groups": {},
    "about": {"target": 3},
    "kept": 3,
    "loss_scale": {"scale": "x"},
    "nonfinite_updates": [],
}


@pytest.mark.parametrize("what", [*DAMAGED, *WRONG])
def test_a_state_that_no_run_wrote_is_passed_over_for_the_checkpoint_before_it(folder, caplog, what):
    content = DAMAGED[what] if what in DAMAGED else with_value(folder, what, WRONG[what])
    replace(folder, "state.json", content)
    with bounded(folder):
        status, lines = train_here(settings(folder, updates=5))
    assert (status, [line["update"] for line in lines]) == (0, [1, 2, 3, 4, 5])
    assert "update 4 is damaged (state.json" in caplog.text
    assert "goes on from update 2" in caplog.text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("feed/lane_states/0/group", 7),
        ("feed/lane_states/0/waiting", {"16x16": [[0, 10**6, 0, 0]]}),
        ("feed/lane_states/0/waiting", {"16x16": [[9, 0, 0, 0]]}),
        ("feed/lane_states/0/waiting", {"16x16": [[0, 0, 0, 0]] * 9}),
        ("feed/next_micro_batch", 10**15),
        ("feed/fingerprint", {}),
        ("feed/fingerprint", {"shards": 3, "lanes": []}),
        ("feed/fingerprint/shards", {"identity": 3}),
        ("optimizer/groups", [[]]),
        ("optimizer/groups", [[{"pattern": None, "lr": {}}]]),
        ("optimizer/values", {"generator.0.weight.exp_avg": []}),
        ("optimizer/optimizers", ["SGD"]),
    ],
)
def test_a_state_that_contradicts_its_run_is_an_error_and_no_traceback(folder, place, value):
    replace(folder, "state.json", with_value(folder, place, value))
    with bounded(folder), pytest.raises(UserError):
        train_here(settings(folder, updates=5))


# ---------------------------------------------------------------- the table of contents


class Asking:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def setting(kind: type, name: str, value: object) -> bytes:
    """A pickle that sets an attribute of a class: BUILD with a state of slots."""
    whole = pickle.dumps((kind, (None, {name: value})), protocol=2)
    # (class, state) on the stack, then BUILD in place of TUPLE2 and its memo.
    end = whole.rindex(pickle.TUPLE2)
    return whole[:end] + pickle.BUILD + pickle.STOP


TABLES = {
    "nothing": b"",
    "a text": pickle.dumps("x"),
    "no tensors": pickle.dumps(Metadata({}, storage_data=None)),
    "values that are no tensors": pickle.dumps(Metadata({"a": 3}, storage_data={})),
    "a tensor without anything": pickle.dumps(
        Metadata({"a": TensorStorageMetadata(None, None, None)}, storage_data={})
    ),
    "a command": pickle.dumps(Asking(os.putenv, "TAMPERED", "1")),
    "a function of builtins": pickle.dumps(Asking(eval, "1")),
    "attributes of a class": setting(Metadata, "__post_init__", 3),
    "deep": pickle.dumps([])[:2] + b"]" * 3 + b"(" * 10_000,
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_of_contents_that_no_run_wrote_is_passed_over_and_runs_nothing(folder, caplog, what):
    replace(folder, ".metadata", TABLES[what])
    with bounded(folder):
        assert train_here(settings(folder, updates=5))[0] == 0
    assert "update 4 is damaged (" in caplog.text
    assert ".metadata cannot be read: " in caplog.text
    assert not hasattr(Metadata, "__post_init__")


def test_the_pickle_of_a_table_reaches_no_class_of_torch(folder):
    """Python's own unpickler sets the attribute of the class: BUILD is a danger, which stand-ins keep away."""
    path = folder / "table"
    path.write_bytes(setting(Metadata, "tampered", 3))
    with pytest.raises(TableError):
        read_table(path)
    assert not hasattr(Metadata, "tampered")
    pickle.loads(path.read_bytes())
    try:
        assert Metadata.tampered == 3
    finally:
        del Metadata.tampered


def test_a_table_of_contents_is_read_as_torch_reads_it(folder):
    path = folder / "tiny" / "state" / "00000004" / ".metadata"
    ours, theirs = read_table(path), pickle.loads(path.read_bytes())
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys() != set()
    assert ours.storage_data == theirs.storage_data
    for name, entry in theirs.state_dict_metadata.items():
        own = ours.state_dict_metadata[name]
        assert (own.size, own.chunks, own.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)
        assert isinstance(own.size, torch.Size)
