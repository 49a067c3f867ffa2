import errno
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest
import webdataset

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from tools.index_dataset import main as index_main
from warpcore.data import index
from warpcore.data.catalog import MANIFEST_NAME, open_catalog
from warpcore.data.index import INDEX_SUFFIX, index_shard, read_rows, read_summary
from warpcore.data.shards import Shard, resolve_sources
from warpcore.data.storage import read_ranges
from warpcore.data.tars import BadShardError
from warpcore.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shard_of(path) -> Shard:
    return resolve_sources(str(path))[0].shards[0]


def rows_of(path) -> list[dict]:
    shard = shard_of(path)
    index_shard(shard)
    return read_rows(shard).to_pylist()


def contents(path, row: dict) -> dict[str, bytes]:
    ranges = list(zip(row["member_offsets"], row["member_sizes"], strict=True))
    return dict(zip(row["member_names"], read_ranges(str(path), ranges), strict=True))


def test_members_are_found_where_webdataset_wrote_them(tmp_path):
    path = tmp_path / "a.tar"
    samples = [
        {"__key__": f"deep/er/{n}", "jpg": picture(8 + n, 9), "JSON": b'{"n": 1}', "mask.png": b"m", "long" * 60: b"l"}
        for n in range(5)
    ]
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    rows = rows_of(path)
    assert [row["key"] for row in rows] == [sample["__key__"] for sample in samples]
    assert [(row["width"], row["height"]) for row in rows] == [(8 + n, 9) for n in range(5)]
    for row, sample in zip(rows, samples, strict=True):
        assert contents(path, row) == {name.lower(): sample[name] for name in sample if name != "__key__"}


@pytest.mark.integration
def test_a_tar_made_by_tar_works_as_it_is(tmp_path):
    folder = tmp_path / "dataset"
    (folder / "sub.dir").mkdir(parents=True)
    for name in ("a", "sub.dir/b.c"):
        (folder / f"{name}.jpg").write_bytes(picture())
        (folder / f"{name}.json").write_text('{"x": 1}')
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "._a.jpg").write_bytes(b"")
    (folder / "README").write_bytes(b"")
    subprocess.run(["tar", "--sort=name", "-cf", "dataset.tar", "dataset/"], cwd=tmp_path, check=True)
    rows = rows_of(tmp_path / "dataset.tar")
    members = {row["key"]: sorted(row["member_names"]) for row in rows}
    assert members == {"dataset/a": ["jpg", "json"], "dataset/sub.dir/b": ["c.jpg", "c.json"]}


def test_members_of_a_key_need_not_be_neighbours_and_a_second_picture_of_a_name_replaces_the_first(tmp_path):
    members = [("a.json", b"{}"), ("b.json", b"{}"), ("a.jpg", picture()), ("b.jpg", picture()), ("a.jpg", picture(9))]
    rows = rows_of(write_tar(tmp_path / "x.tar", members))
    assert [(row["key"], sorted(row["member_names"]), row["width"]) for row in rows] == [
        ("a", ["jpg", "json"], 9),
        ("b", ["jpg", "json"], 16),
    ]


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    members = [
        (f"{orientation}_{name}.{name}", picture(30, 20, kind, orientation))
        for orientation in (1, 3, 6, 8)
        for name, kind in kinds.items()
    ]
    rows = rows_of(write_tar(tmp_path / "x.tar", members))
    for row in rows:
        expected = (20, 30) if row["key"][0] in "68" else (30, 20)
        assert (row["width"], row["height"]) == expected, row["key"]


def test_an_unreadable_picture_and_a_missing_one_are_problems_of_their_rows(tmp_path):
    bomb = bytearray(picture(16, 12, "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    members = [("a.jpg", b"junk"), ("b.json", b"{}"), ("c.jpg", picture()), ("d.png", bytes(bomb)), ("e.jpg", b"")]
    rows = {row["key"]: row for row in rows_of(write_tar(tmp_path / "x.tar", members))}
    assert rows["a"]["problem"].startswith("undecodable .jpg: cannot identify image file")
    assert rows["b"]["problem"] == "no picture"
    assert rows["c"]["problem"] is None
    assert (rows["d"]["width"], rows["d"]["problem"]) == (60_000, None), "its size is for the plan to judge"
    assert rows["e"]["problem"].startswith("undecodable")
    assert read_summary(shard_of(tmp_path / "x.tar")).problems == 3


def test_fields_of_json_become_typed_columns(tmp_path):
    lines = [
        {"i": 1, "f": 1, "b": True, "s": "x", "mix": 1, "tags": [1], "big": 2**70, "only": None},
        {"i": 2, "f": 0.5, "b": False, "s": "\ud800", "mix": "two", "late": 7},
    ]
    members = []
    for number, line in enumerate([*map(json.dumps, lines), "broken", "[1]"]):
        members += [(f"{number}.json", line.encode()), (f"{number}.jpg", picture())]
    shard = shard_of(write_tar(tmp_path / "x.tar", members))
    summary = index_shard(shard)
    rows = read_rows(shard)
    columns = {name: rows[f"json.{name}"].to_pylist() for name in summary.fields}
    assert columns == {
        "i": [1, 2, None, None],
        "f": [1.0, 0.5, None, None],
        "b": [True, False, None, None],
        "s": ["x", "\\ud800", None, None],
        "mix": [1, None, None, None],
        "big": [float(2**70), None, None, None],
        "late": [None, 7, None, None],
    }
    assert summary.nested == ("tags",)
    assert read_rows(shard, ["json.i", "key", "json.none"], 1, 2).to_pylist() == [{"json.i": 2, "key": "1"}]


def test_any_range_of_rows_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ROW_GROUP_ROWS", 4)
    shard = shard_of(write_shard(tmp_path / "x.tar", 11))
    index_shard(shard)
    for start in range(11):
        for stop in range(start + 1, 12):
            found = read_rows(shard, ["key"], start, stop)["key"].to_pylist()
            assert found == [f"{number:06d}" for number in range(start, stop)]


def test_of_a_cut_tar_the_whole_samples_are_used_and_the_cut_is_told_wherever_it_is(tmp_path, caplog):
    whole = write_shard(tmp_path / "whole.tar", 4).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
        last_bytes = [member.offset_data + member.size for member in tar]
    members = len(ends) // 4
    for length in [*range(1, ends[-1], 331), *range(512, ends[-1] + 1, 512)]:
        path = tmp_path / f"cut{length}.tar"
        path.write_bytes(whole[:length])
        num_whole = sum(length >= last for last in last_bytes[members - 1 :: members])
        caplog.clear()
        if length < last_bytes[0]:
            with pytest.raises(BadShardError, match=f"{path} "):
                index_shard(shard_of(path))
        elif num_whole:
            summary = index_shard(shard_of(path))
            assert (summary.rows, summary.problems) == (num_whole + 1, 1)
            assert f"{path} is cut short" in caplog.text
            assert f"{num_whole} sample" in caplog.text
            rows = read_rows(shard_of(path))
            assert rows["problem"].to_pylist() == [None] * num_whole + [f"{path} is cut short"]
    path.write_bytes(whole[: ends[-1] + 512])  # one block of zeros is a whole end
    assert index_shard(shard_of(path)).problems == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (bytes(10240), "an empty tar"),
        (b"hello" * 1000, "not a tar"),
        (b"\x1f\x8b" + bytes(1000), "compressed with gzip"),
    ],
)
def test_what_is_no_usable_tar_is_named(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(BadShardError, match=f"x.tar.*{message}"):
        index_shard(shard_of(path))


def test_a_tar_without_pictures_says_what_it_holds(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b""), ("b.txt", b""), ("b.json", b"{}")])
    with pytest.raises(BadShardError, match=r"no picture or video; its 2 samples hold 2 x \.txt, 1 x \.json"):
        index_shard(shard_of(path))


def test_damage_and_joined_tars_are_noticed(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", 3).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(whole + whole)
    with pytest.raises(BadShardError, match="goes on after its end"):
        index_shard(shard_of(path))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        header = tar.getmembers()[4].offset
    path.write_bytes(whole[:header] + b"damage" + whole[header + 6 :])
    with pytest.raises(BadShardError, match=f"damaged: no valid header at byte {header}"):
        index_shard(shard_of(path))


def test_a_changed_tar_is_indexed_again_and_that_is_said(tmp_path, caplog):
    path = write_shard(tmp_path / "x.tar", 2)
    assert catalog_of(path).num_rows == 2
    assert catalog_of(path).num_rows == 2
    assert not caplog.records
    write_shard(path, 3)
    assert catalog_of(path).num_rows == 3
    assert "changed since it was indexed" in caplog.text


def test_a_damaged_index_is_made_anew(tmp_path):
    path = write_shard(tmp_path / "x.tar", 2)
    catalog_of(path)
    (tmp_path / f"x.tar{INDEX_SUFFIX}").write_bytes(b"PAR1 no")
    assert catalog_of(path).num_rows == 2


def test_the_index_of_a_read_only_place_goes_to_the_cache(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "x.tar", 2)
    write = index.storage_for("/").__class__.write

    def refuse(self, url, content):
        if "cache" not in url:
            raise PermissionError(url)
        write(self, url, content)

    monkeypatch.setattr(index.storage_for("/").__class__, "write", refuse)
    shard = shard_of(path)
    index_shard(shard)
    assert not (tmp_path / f"x.tar{INDEX_SUFFIX}").exists()
    assert len(list((tmp_path / "cache/warpcore/index").iterdir())) == 1
    assert read_summary(shard).rows == len(read_rows(shard)) == 2


def full(*names: str):
    """An `os.replace` for a disk without room for files whose path holds one of the names."""
    replace = os.replace

    def refuse(source, target):
        if any(name in str(target) for name in names):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    return refuse


def test_an_index_that_a_full_disk_has_no_room_for_goes_to_the_cache_and_the_disk_is_named(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "data").mkdir()
    path = write_shard(tmp_path / "data" / "x.tar", 2)
    monkeypatch.setattr(os, "replace", full("/data/"))
    assert catalog_of(path).num_rows == 2
    assert os.listdir(tmp_path / "data") == ["x.tar"], "nothing half written is left"
    assert (
        f"{tmp_path / 'data'}: No space left on device; what belongs there is kept in {tmp_path}/cache" in caplog.text
    )
    assert read_summary(shard_of(path)).rows == 2


def test_where_no_index_can_be_written_every_place_and_the_remedy_are_named(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "x.tar", 2)
    monkeypatch.setattr(os, "replace", full("/"))
    with pytest.raises(UserError, match=rf"{tmp_path}: No space left.*{tmp_path}/cache.*set WARPCORE_INDEX_CACHE"):
        index_shard(shard_of(path))
    assert os.listdir(tmp_path / "cache/warpcore/index") == []


@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_read_only_data_can_be_used_without_a_home_that_can_be_written(tmp_path, monkeypatch, home):
    path = write_shard(tmp_path / "x.tar", 2)
    write = index.storage_for("/").__class__.write

    def refuse(self, url, content):
        if os.path.dirname(url) == str(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")
        write(self, url, content)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(index.storage_for("/").__class__, "write", refuse)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", home)
    shard = shard_of(path)
    index_shard(shard)
    assert len(list(tmp_path.glob("temporary/warpcore-*/warpcore/index/*.parquet"))) == 1
    assert read_summary(shard).rows == len(read_rows(shard)) == 2


def test_start_up_reads_the_manifest_and_no_index(tmp_path, monkeypatch):
    for number in range(12):
        write_shard(tmp_path / f"{number:02d}.tar", 1 + number % 3, first=10 * number)
    first = catalog_of(tmp_path)
    assert (tmp_path / MANIFEST_NAME).exists()
    monkeypatch.setattr("warpcore.data.catalog.read_summary", lambda shard: pytest.fail("an index was opened"))
    second = pickle.loads(pickle.dumps(catalog_of(tmp_path)))
    assert second.rows.tolist() == first.rows.tolist() == [1, 2, 3] * 4
    assert (second.fields, second.members) == ({"score", "parity"}, {"jpg", "json", "txt"})
    assert second.name(3) == "03.tar"
    assert second.identities() == first.identities()
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)
    assert catalog_of(moved).identities() == first.identities()


def test_a_shard_that_the_manifest_does_not_know_is_looked_up(tmp_path):
    for number in range(10):
        write_shard(tmp_path / f"{number}.tar", 1)
    catalog_of(tmp_path)
    write_shard(tmp_path / "0.tar", 4)
    write_shard(tmp_path / "new.tar", 5)
    assert catalog_of(tmp_path).num_rows == 9 + 4 + 5


def test_the_order_of_sources_does_not_matter_to_the_catalog(tmp_path):
    paths = [
        {"path": str(write_shard(tmp_path / f"{name}.tar", 1)), "weight": weight} for name, weight in ("a1", "b2")
    ]
    paths = [{**path, "weight": int(path["weight"])} for path in paths]
    one, other = (open_catalog(resolve_sources(order)) for order in (paths, paths[::-1]))
    assert one.identities() == other.identities()
    assert one.weights.tolist() == other.weights.tolist() == [1.0, 2.0]


@pytest.mark.integration
def test_the_index_tool_indexes_all_whole_tars_and_names_the_others(tmp_path, capsys):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", 2)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:3000])
    (tmp_path / "no.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match=r"1 tars can't be used:\n.*no.tar is not a tar"):
        index_main([str(tmp_path), "--workers", "1"])
    told = capsys.readouterr().out
    assert "5 to index\nabout " in told
    assert "8 samples, 1 of them without a usable picture" in told
    (tmp_path / "no.tar").unlink()
    index_main([str(tmp_path / "*.tar")])
    assert "; 0 to index" in capsys.readouterr().out


def test_the_first_use_says_that_it_indexes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    catalog_of(write_shard(tmp_path / "x.tar", 2))
    assert "indexing 1 tars" in caplog.text
