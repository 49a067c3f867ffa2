"""An index tells a fault of the disk from one of the data, and survives what people have on their disks."""

import errno
import json
import os
import struct
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from tools.index_dataset import main as index_main
from warpcore.data import storage
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.filters import Filter
from warpcore.data.index import INDEX_SUFFIX, index_shard, read_rows, read_summary
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def shard_of(path):
    return resolve_sources(str(path))[0].shards[0]


class Failing:
    """A file that fails so often to read one place."""

    def __init__(self, file, place, failures):
        self._file, self._place, self.failures = file, place, failures

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, size=-1):
        if self.failures and self._file.tell() == self._place:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self._file.read(size)


@pytest.mark.parametrize("name", ["a.jpg", "a.json"])
@pytest.mark.parametrize(("failures", "lasting"), [(2, False), (99, True)])
def test_an_io_fault_is_not_written_into_the_index(tmp_path, monkeypatch, name, failures, lasting):
    members = {"a.jpg": picture(), "a.json": b'{"s": 1}'}
    path = write_tar(tmp_path / "x.tar", list(members.items()))
    place = path.read_bytes().index(members[name])
    whole = storage.LocalStorage.open

    def open_failing(self, url):
        file = whole(self, url)
        return Failing(file, place, failures) if url.endswith(".tar") else file

    monkeypatch.setattr(storage.LocalStorage, "open", open_failing)
    shard = shard_of(path)
    if lasting:
        with pytest.raises(OSError, match="Input/output error"):
            index_shard(shard)
        assert read_summary(shard) is None
        return
    assert index_shard(shard).problems == 0
    assert read_rows(shard)["json.s"].to_pylist() == [1]


def damaged(content: bytes, kind: str) -> bytes:
    if kind == "thrift":  # the footer's bytes are other ones, of the same length
        (length,) = struct.unpack("<I", content[-8:-4])
        return content[: -8 - length] + b"\xff" * length + content[-8:]
    return content[: len(content) // 2]


@pytest.mark.parametrize("kind", ["thrift", "half", "foreign", "pages"])
@pytest.mark.parametrize("name", ["index", "manifest"])
def test_a_damaged_parquet_file_is_made_anew(tmp_path, name, kind):
    for number in range(9):
        write_shard(tmp_path / f"{number}.tar", 2)
    catalog_of(tmp_path)
    path = tmp_path / (f"0.tar{INDEX_SUFFIX}" if name == "index" else MANIFEST_NAME)
    if name == "index":
        (tmp_path / MANIFEST_NAME).unlink()
    content = path.read_bytes()
    if kind == "foreign":
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    elif kind == "pages":
        path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    else:
        path.write_bytes(damaged(content, kind))
    catalog = catalog_of(tmp_path)
    assert catalog.num_rows == 18
    assert len(read_rows(catalog.shard(0))) == 2


def test_two_data_sets_of_one_folder_share_its_manifest(tmp_path, monkeypatch):
    for number in range(20):
        write_shard(tmp_path / f"{number:02d}.tar", 1)
    catalog_of(tmp_path / "{00..09}.tar")
    catalog_of(tmp_path / "{10..19}.tar")
    (tmp_path / "03.tar").unlink()
    write_shard(tmp_path / "04.tar", 2)
    assert pq.read_table(tmp_path / MANIFEST_NAME).num_rows == 20
    index_main([str(tmp_path / "{10..19}.tar"), "--workers", "1"])
    assert pq.read_table(tmp_path / MANIFEST_NAME).num_rows == 18, "without the one that is gone and the changed one"
    monkeypatch.setattr("warpcore.data.catalog.read_summary", lambda shard: pytest.fail("an index was opened"))
    assert catalog_of(tmp_path / "{00..02}.tar", tmp_path / "{10..19}.tar").num_rows == 13


def test_names_need_not_be_utf8(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    members = [(f"{odd}.jpg", picture()), (f"{odd}.{odd}", b"x"), (f"{odd}.json", b"{}")]
    path = write_tar(tmp_path / f"{odd}.tar", members)
    catalog = catalog_of(path)
    assert catalog.urls == [str(path)]
    (row,) = read_rows(catalog.shard(0)).to_pylist()
    assert (row["key"], row["member_names"]) == ("caf\\udce9", ["jpg", "caf\\udce9", "json"])
    json.dumps(catalog.fingerprint()).encode()
    for number in range(9):
        write_shard(tmp_path / f"{number}.tar", 1)
    assert catalog_of(tmp_path).num_rows == catalog_of(tmp_path).num_rows == 10


def test_an_odd_text_among_numbers_counts_as_missing_and_is_told(tmp_path, caplog):
    members = []
    for number, value in enumerate([5, 4.75, "n/a", True]):
        members += [(f"{number}.jpg", picture()), (f"{number}.json", json.dumps({"s": value}).encode())]
    catalog = catalog_of(write_tar(tmp_path / "x.tar", members))
    verdict = Filter.parse(["s", "lambda s: s > 4.5"]).evaluate(read_rows(catalog.shard(0)))
    assert (verdict.passed.tolist(), verdict.missing.sum()) == ([True, True, False, False], 1)
    assert "'s' is a number, but text in 1 samples ('n/a')" in caplog.text


def test_a_format_that_the_reader_refuses_is_a_problem_of_its_row(tmp_path):
    members = [("a.jpg", picture()), ("b.jpg", picture(kind="EPS"))]
    catalog = catalog_of(write_tar(tmp_path / "x.tar", members))
    assert [bool(problem) for problem in read_rows(catalog.shard(0))["problem"].to_pylist()] == [False, True]


@pytest.mark.integration
def test_the_index_tool_goes_on_after_a_tar_that_can_not_be_read(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "a.tar", 2)
    path = write_shard(tmp_path / "b.tar", 2)
    shards = resolve_sources(str(tmp_path))
    path.unlink()
    monkeypatch.setattr("tools.index_dataset.resolve_sources", lambda paths: shards)
    with pytest.raises(UserError, match=r"1 tars can't be used:\n.*b\.tar"):
        index_main([str(tmp_path), "--workers", "1"])
    assert "2 samples" in capsys.readouterr().out


@pytest.mark.integration
def test_the_index_tool_estimates_what_indexing_reads(tmp_path, monkeypatch, capsys):
    members = []
    for number in range(20):
        noise = os.urandom(30_000)
        members += [(f"{number}.jpg", picture()), (f"{number}.latent.npy", noise), (f"{number}.txt", noise[:10_000])]
    path = write_tar(tmp_path / "x.tar", members)
    index_main([str(path), "--workers", "1"])
    in_kb = (20 * (3 * 512 + len(picture()) + 8192 + 10_000)) / 1000
    assert f"about {in_kb:.1f} kB will be read" in capsys.readouterr().out


@pytest.mark.parametrize("metadata", [b"{}", b"[]", b"5", b'{"size_bytes": SIZE, "version": 3}'])
def test_an_index_whose_metadata_are_of_another_kind_is_written_again(tmp_path, metadata):
    tar = write_shard(tmp_path / "x.tar", 3)
    rows = read_rows(catalog_of(tar).shard(0))
    path = Path(f"{tar}.index.parquet")
    metadata = metadata.replace(b"SIZE", str(tar.stat().st_size).encode())
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"warpcore.index": metadata}), path)
    assert read_rows(catalog_of(tar).shard(0)) == rows


def test_a_pipe_with_the_name_of_a_tar_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar is a pipe"):
        catalog_of(tmp_path)
