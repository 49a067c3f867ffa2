"""Manifests of checkpoints that others tampered with: the checkpoint is read, or why it is damaged is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import bounded, fuzz
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore.checkpoint import writer_of
from warpcore.errors import UserError
from warpcore.places import LocalPlace, fingerprint, read_manifest

FILES = ("state.json", ".metadata", "__0_0.distcp")
VALUES = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=5,
)
NAMES = st.text(max_size=6) | st.sampled_from(
    ["../x", "a/b", "..", "\0", "\ud800", "x" * 300, "__" + "9" * 5000 + "_0"]
)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A checkpoint of update 5."""
    state = tmp_path_factory.mktemp("run") / "state" / "00000005"
    state.mkdir(parents=True)
    for name in FILES:
        (state / name).write_bytes(name.encode() * 9)
    return state


def whole(state: Path) -> dict:
    return {"files": {name: fingerprint(state / name) for name in FILES}}


def told_of(state: Path, content: bytes) -> str | None:
    """Why a checkpoint with this manifest is not whole."""
    (state / "manifest.json").write_bytes(content)
    place = LocalPlace(state.parents[1])
    with bounded(state):
        files = read_manifest(state)
        if isinstance(files, str):
            return files
        assert max(map(writer_of, files)) >= 0
        return next(filter(None, (place.difference(5, name, file) for name, file in files.items())), None)


@fuzz(100)
@given(st.data())
def test_a_tampered_manifest_is_read_or_why_not_is_told(state, data):
    manifest = whole(state)
    owner = manifest
    key = "files"
    for _ in range(data.draw(st.integers(0, 2))):
        owner = owner[key]
        key = data.draw(st.sampled_from(sorted(owner)))
    change = data.draw(st.sampled_from(["value", "gone", "name"]))
    value = owner.pop(key)
    if change != "gone":
        new = data.draw(NAMES) if change == "name" else key
        owner[new] = value if change == "name" else data.draw(VALUES)
    content = json.dumps(manifest).encode()
    told = told_of(state, content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    assert told is None or told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "manifest.json cannot be read: ExcessiveJsonError: it is nested too deeply"),
        (b"9" * 5000, "manifest.json cannot be read: ValueError"),
        (b"null", "manifest.json cannot be read: TypeError"),
        (b"\xff\xfe", "manifest.json cannot be read"),
        (b'{"files": {"state.json": {"bytes": "1", "sha256": "0"}}}', "says no size and hash of state.json"),
        (b'{"files": {"state.json": {"bytes": true, "sha256": "0"}}}', "says no size and hash of state.json"),
        (b'{"files": {"state.json": {"bytes": 1, "sha256": 0}}}', "says no size and hash of state.json"),
        (
            json.dumps({"files": {name: {"bytes": 2**30, "sha256": "0"} for name in FILES}}).encode(),
            "manifest.json lists a state.json of more than 128 MiB",
        ),
        (b'{"files": {"\\ud800": {"bytes": 1, "sha256": "0"}}}', "which is not a plain file name"),
    ],
)
def test_what_is_no_manifest_is_told(state, content, told):
    assert told in told_of(state, content)
    assert told_of(state, json.dumps(whole(state)).encode()) is None


@pytest.mark.integration
@pytest.mark.parametrize("content", ["[" * 100_000, '{"files": {"state.json": {"bytes": [], "sha256": {}}}}'])
def test_a_run_goes_on_from_the_checkpoint_before_one_with_a_tampered_manifest(tmp_path, caplog, content):
    given = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 6), updates=2, save_every=1)
    train_here(given)
    states = tmp_path / "runs" / "tiny" / "state"
    (states / "00000002" / "manifest.json").write_text(content, encoding="utf-8")
    assert train_here(given)[0] == 0
    assert "the checkpoint of update 2 is damaged" in caplog.text
    for path in states.glob("[0-9]*/manifest.json"):
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no checkpoint of this run is whole"):
        train_here(given)
