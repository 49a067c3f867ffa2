"""Files of a cache that others tampered with are refused by name, or their rows are recreated; never a traceback."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families.common.cache_records import Record
from families.common.cached_rows import Copied, OldRows, Sources
from families.common.features import Origin
from families.common.prompts import read_prompts, write_prompts
from tests.bounds import bounded, fuzz
from tests.warpcore.data.tars import write_tar
from tests.warpcore.data.test_tar_headers import base_256, header
from warpcore.data.shards import Shard
from warpcore.errors import UserError

MADE_WITH = {"text_network": "0" * 64}
ORIGIN = {
    "features": {"latent": ["image_size", "crop_mode"], "text": ["captions_getter"]},
    "makers": {"latent": "vae", "text": "text"},
    "networks": {"vae": {"file": "a.safetensors", "sha256": "0" * 64}, "text": {"file": "b", "sha256": "1" * 64}},
    "settings": {"image_size": 64, "crop_mode": "center", "captions_getter": ["txt", "identity"]},
    "dtype": "float16", "variants": 2, "seed": 1,
    "shapes": {"latent": {"64x64": [4, 8, 8]}, "text": {"64x64": [8, 40]}},
    "variable_length": ["text"], "source": "data", "version": 1,
}  # fmt: skip
VALUES = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=5,
)


def damaged(draw, content) -> str:
    """A JSON text in which some value, at any depth, is another one, or missing."""
    content = json.loads(json.dumps(content))
    owner, key = content, draw(st.sampled_from(sorted(content)))
    while isinstance(owner[key], dict) and owner[key] and draw(st.booleans()):
        owner = owner[key]
        key = draw(st.sampled_from(sorted(owner)))
    if draw(st.booleans()):
        owner[key] = draw(VALUES)
    else:
        del owner[key]
    text = json.dumps(content)
    return text[: draw(st.just(len(text)) | st.integers(0, len(text)))]


@fuzz(40)
@given(st.data())
def test_a_tampered_cache_json_is_used_or_refused_by_name(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "cache.json").write_text(damaged(data.draw, ORIGIN), encoding="utf-8")
    with bounded(folder):
        try:
            origin = Origin.read(str(folder))
            origin.fields(origin.features.keys() & origin.shapes.keys())
            assert all(isinstance(one, str) for one in origin.differences(Origin(**ORIGIN), ORIGIN["features"]))
        except UserError as error:
            told = str(error)
            assert str(folder / "cache.json") in told


@fuzz(40)
@given(st.data())
def test_a_tar_with_a_tampered_record_is_recreated(tmp_path_factory, data):
    tar = tmp_path_factory.mktemp("cache") / "0.tar"
    tar.write_bytes(bytes(1024))
    source = Shard("data/0.tar", 5, "etag", "content")
    Record((5, "content"), 4, 4, rejected={"no picture": 1}, squared={"latent": 1.0}).write(tar)
    path = Path(f"{tar}.cache.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert Record.read(tar, source).rows == 4
    path.write_text(damaged(data.draw, whole), encoding="utf-8")
    with bounded(tar.parent):
        record = Record.read(tar, source)
        assert record is None or Record.total([record, record]).rows == 2 * record.rows


@fuzz(40)
@given(st.data())
def test_tampered_prompts_are_those_that_were_written_or_encoded_again(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    write_prompts(str(folder), {text: {"c": torch.ones(2, 3)} for text in ("", "a dog")}, MADE_WITH)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with bounded(folder):
        rows = read_prompts(str(folder), MADE_WITH)
    assert all(len(row) == 1 for row in rows.values())


SOURCES = {"pictures": ["p0", "p1"], "text": "t0"}
FACTS = {"width": 64, "height": 64, "crops": [[0, 1], [2, 3]], "sources": SOURCES | {"caption_cut": True}}


def old_tar(folder: Path, facts: str) -> Path:
    """A tar of a cache as it was before its source changed."""
    others = [("0.latent.npy", b"zero"), ("0.latent.1.npy", b"one"), ("0.text.npy", b"text")]
    return write_tar(folder / ".0.tar.old", [("0.picture.json", facts.encode()), *others])


def copied_from(tar: Path) -> Copied:
    return OldRows([tar], ["latent"], ["text"]).copy(Sources(("p0", "p1"), "t0"))


def test_rows_of_a_whole_old_tar_are_copied(tmp_path):
    members = {"latent.npy": b"zero", "latent.1.npy": b"one", "text.npy": b"text"}
    assert copied_from(old_tar(tmp_path, json.dumps(FACTS))) == Copied(members, {0: [0, 1], 1: [2, 3]}, True, True)


@fuzz(40)
@given(st.data())
def test_rows_of_a_tampered_old_tar_are_copied_or_the_tar_is_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    tar = old_tar(folder, damaged(data.draw, FACTS))
    content = bytearray(tar.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, 5120))] = data.draw(st.integers(0, 255))
    tar.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    told = None
    with bounded(folder):
        try:
            assert len(copied_from(tar).members) <= 3
        except UserError as error:
            told = str(error)
    assert told is None or told.startswith(f"{tar}, of before the source changed, is damaged")


def test_an_old_tar_with_a_size_below_zero_is_named(tmp_path):
    (tmp_path / ".0.tar.old").write_bytes(header(b"0.picture.json", b"0", base_256(-512)) + bytes(1024))
    with pytest.raises(UserError, match=r"\.0\.tar\.old, of before .* damaged .*at byte 0.*: remove it"):
        copied_from(tmp_path / ".0.tar.old")


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "5", "{", '"a"', '{"version": 1}', '{"version": 2}'])
def test_a_cache_json_of_another_kind_is_refused_by_name(tmp_path, content):
    (tmp_path / "cache.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"cache\.json is .*; remove the folder"):
        Origin.read(str(tmp_path))


def test_a_whole_cache_json_is_read(tmp_path):
    Origin(**ORIGIN).write(tmp_path)
    assert Origin.read(str(tmp_path)) == Origin(**ORIGIN)


def test_a_pipe_in_the_place_of_a_caches_files_is_refused(tmp_path):
    for name in ("cache.json", "prompts.safetensors"):
        os.mkfifo(tmp_path / name)
    for read in (lambda: Origin.read(str(tmp_path)), lambda: read_prompts(str(tmp_path), MADE_WITH)):
        with pytest.raises(UserError, match="is a pipe; a regular file is needed"):
            read()
