"""A cache whose data set changed: what is copied, what is encoded, and that copies are those of before."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from families.cascade import versions
from families.common import cache_records, cache_writer
from tests.caches import make_cache, write_pictures
from tests.many_processes import launch_processes
from tools import cache

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(small_cascade, tmp_path):
    write_pictures(tmp_path / "pictures" / "0.tar", 40)
    return small_cascade | {
        "webdataset_path": str(tmp_path / "pictures"), "multi_aspect_ratio": [1, 2], "crop_mode": "center",
    }  # fmt: skip


@pytest.fixture
def encoded(monkeypatch) -> Counter:
    """How many pictures and captions networks have encoded, but for the tool's look at the shapes of features."""
    found, plain = Counter(), cache.use_case

    def use_case(script: Path) -> type:
        class Counted(plain(script)):
            def picture_features(self, batch, random):
                found.update({"pictures": len(batch.keys)} if batch.keys != [""] else {})
                return super().picture_features(batch, random)

            def caption_features(self, batch):
                found.update({"captions": len(batch.keys)} if batch.keys != [""] else {})
                return super().caption_features(batch)

        return Counted

    monkeypatch.setattr(cache, "use_case", use_case)
    return found


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {info.name: file.extractfile(info).read() for info in file}


def features(*tars: Path) -> dict[str, bytes]:
    return {name: data for tar in tars for name, data in members(tar).items() if name.endswith(".npy")}


def facts_and_features(*tars: Path) -> dict[str, bytes]:
    facts = {name: data for tar in tars for name, data in members(tar).items() if name.endswith("picture.json")}
    return facts | features(*tars)


def write_members(tar: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(tar, "w") as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def assert_like_new(settings: dict, out: Path, *options: str) -> None:
    """A cache holds what one that is made at once would."""
    whole = make_cache("train_c", settings, out.with_name("whole"), *options)
    for tar in whole.glob("*.tar"):
        here, there = members(out / tar.name), members(tar)
        assert list(here) == list(there)
        for name, content in here.items():
            if name.endswith(".npy"):
                values = [np.load(io.BytesIO(one)).astype(np.float32) for one in (content, there[name])]
                np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-3, err_msg=name)
            else:
                assert content == there[name], name
    shutil.rmtree(whole)


def test_ten_pictures_more_cost_ten_encodings(settings, tmp_path, encoded, monkeypatch, capsys):
    monkeypatch.setattr(cache_writer, "CHUNK_ROWS", 16)
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out)
    assert encoded == {"pictures": 40, "captions": 40}
    before = features(out / "0.tar")
    encoded.clear()
    make_cache("train_c", settings, out)
    assert encoded == {}
    write_pictures(tar, 50)
    capsys.readouterr()
    make_cache("train_c", settings, out)
    assert encoded == {"pictures": 10, "captions": 10}
    told = capsys.readouterr().out
    assert "cached 50 of 50 samples" in told
    assert "40 rows reused, 0 in part" in told
    after = features(out / "0.tar")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) * 50 // 40
    assert not list(out.rglob(".*.old"))
    assert_like_new(settings, out)


def test_a_row_is_encoded_where_its_own_bytes_changed(settings, tmp_path, encoded, capsys):
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out)
    source, before = members(tar), features(out / "0.tar")

    def make(contents: dict[str, bytes]) -> tuple[Counter, dict[str, bytes]]:
        encoded.clear()
        write_members(tar, contents)
        make_cache("train_c", settings, out)
        return Counter(encoded), features(out / "0.tar")

    counts, after = make(source | {"00003.txt": b"w9 w8 w7"})
    assert counts == {"captions": 1}
    assert changed(before, after) == {"00003.clip_text.npy", "00003.clip_text_pooled.npy"}
    assert "39 rows reused, 1 in part" in capsys.readouterr().out
    before = after
    counts, after = make(members(tar) | {"00004.png": source["00008.png"][:-12] + b"\0" + source["00008.png"][-12:]})
    assert counts == {"pictures": 1}
    assert changed(before, after) == {"00004.latent.npy"}
    before = after
    counts, after = make({name: data for name, data in members(tar).items() if not "00010" <= name[:5] < "00020"})
    assert counts == {}
    assert after == {name: data for name, data in before.items() if not "00010" <= name[:5] < "00020"}
    assert_like_new(settings, out)
    # Rows that moved to another tar, as build_dataset makes them when a folder grows.
    source, before = members(tar), after
    write_members(tar.with_name("1.tar"), {name: data for name, data in source.items() if name < "00025"})
    counts, after = make({name: data for name, data in source.items() if name >= "00025"})
    assert counts == {}
    assert features(out / "0.tar", out / "1.tar") == before


def test_random_crops_stay_with_their_pictures(settings, tmp_path, encoded, capsys):
    settings = settings | {"crop_mode": "random"}
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out, "--variants", "2")
    before = facts_and_features(out / "0.tar")
    encoded.clear()
    source = members(tar)
    write_members(tar, {name: data for name, data in source.items() if "00010" <= name[:5] != "00030"})
    write_members(tar.with_name("1.tar"), {name: data for name, data in source.items() if name < "00008"})
    make_cache("train_c", settings, out, "--variants", "2")
    assert encoded == {}  # though rows behind those that are gone, and in another tar, would draw other crops
    assert "37 rows reused, 0 in part" in capsys.readouterr().out
    after = facts_and_features(out / "0.tar", out / "1.tar")
    assert after == {name: before[name] for name in after}
    assert len(after) == len(before) * 37 // 40


def test_a_tar_is_there_while_another_takes_its_place(settings, tmp_path, monkeypatch):
    """A run may read it at any moment; it is the old one or the new one."""
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out)
    before = (out / "0.tar").read_bytes()
    write_pictures(tar, 42)
    plain, seen = cache_writer.CacheTar.write, []

    def write(*args):
        seen.append((out / "0.tar").read_bytes() == before)
        return plain(*args)

    monkeypatch.setattr(cache_writer.CacheTar, "write", write)
    records = cache_records.Record.write

    def write_record(*args):
        seen.append((out / "0.tar").is_file())
        return records(*args)

    monkeypatch.setattr(cache_records.Record, "write", write_record)
    make_cache("train_c", settings, out)
    assert seen == [True, True]
    assert (out / "0.tar").read_bytes() != before


def _process(mini: versions.Version, settings: dict, out: Path) -> None:
    versions.VERSIONS["mini"] = mini
    make_cache("train_c", settings, out)


def test_two_processes_copy_rows_of_each_others_tars(settings, tmp_path):
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out)
    before, source = features(out / "0.tar"), members(tar)
    write_members(tar.with_name("1.tar"), {name: data for name, data in source.items() if name < "00015"})
    write_members(tar, {name: data for name, data in source.items() if name >= "00015"})
    launch_processes(2, _process, versions.VERSIONS["mini"], settings, out)
    assert features(out / "0.tar", out / "1.tar") == before
    reused = [json.loads(path.read_text())["reused"] for path in sorted(out.glob("*.tar.cache.json"))]
    assert reused == [25, 15]
    assert not list(out.rglob(".*.old*"))


def test_an_interrupted_update_goes_on_with_what_it_copied_from(settings, tmp_path, encoded, monkeypatch):
    out, tar = tmp_path / "cache", tmp_path / "pictures" / "0.tar"
    make_cache("train_c", settings, out)
    write_pictures(tar, 42)
    with monkeypatch.context() as broken:
        broken.setattr(cache_writer.CacheTar, "write", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="the disk is gone"):
            make_cache("train_c", settings, out)
    encoded.clear()
    make_cache("train_c", settings, out)
    assert encoded["pictures"] == 2
    assert not list(out.rglob(".*.old"))


def test_a_cache_of_before_hashes_is_encoded_again(settings, tmp_path, encoded):
    out = make_cache("train_c", settings, tmp_path / "cache")
    contents = members(out / "0.tar")
    write_members(out / "0.tar", {
        name: data.split(b', "sources"')[0] + b"}" if name.endswith("picture.json") else data
        for name, data in contents.items()
    })  # fmt: skip
    encoded.clear()
    write_pictures(tmp_path / "pictures" / "0.tar", 41)
    make_cache("train_c", settings, out)
    assert encoded == {"pictures": 41, "captions": 41}
