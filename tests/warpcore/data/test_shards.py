import os
import pickle
from pathlib import Path

import pytest

from tests.bounds import bounded
from tests.warpcore.data.tars import write_shard
from warpcore.data import storage
from warpcore.data.globs import matching
from warpcore.data.shards import folders_named_whole, named_folders, resolve_sources
from warpcore.data.storage import read_ranges
from warpcore.data.storage_protocol import ChangedShardError
from warpcore.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("00000", "00001", "00002", "more/00003"):
        path = tmp_path / f"data/{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(webdataset_path: object, folder: Path) -> list[tuple[float, list[str]]]:
    sources = resolve_sources(webdataset_path)
    base = str(folder / "data") + "/"
    return [(source.weight, [shard.url.removeprefix(base) for shard in source.shards]) for source in sources]


ALL = ["00000.tar", "00001.tar", "00002.tar", "more/00003.tar"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/00001.tar", ["00001.tar"]),
        ("file:{folder}/data/00001.tar", ["00001.tar"]),
        ("file://{folder}/data/00001.tar", ["00001.tar"]),
        ("data", ALL),
        ("data/", ALL),
        ("data/*.tar", ALL[:3]),
        ("data/**/*.tar", ALL),
        ("data/0000[12].tar", ALL[1:3]),
        ("data/{{00000..00002}}.tar", ALL[:3]),
        ("data/{{00000,more/00003}}.tar", [ALL[0], ALL[3]]),
        ("data/{{more,.}}/*.tar", ALL),
        ("data/{{00000..00002..2}}.tar", [ALL[0], ALL[2]]),
        ("data/{{0000{{0..1}},more/00003}}.tar", [ALL[0], ALL[1], ALL[3]]),
    ],
)
def test_every_way_of_naming_tars_finds_them_in_order(folder, path, expected):
    assert names(path.format(folder=folder), folder) == [(1.0, expected)]


def test_lists_and_weights_make_sources(folder):
    path = ["data/00000.tar", {"path": ["data/00001.tar", "data/more"], "weight": 0.5}]
    expected = [(1.0, ["00000.tar"]), (0.5, ["00001.tar"]), (0.5, ["more/00003.tar"])]
    assert names(path, folder) == expected


def test_a_yml_holds_the_list_and_its_paths_start_at_its_folder(folder, monkeypatch):
    (folder / "data/sets.yml").write_text("- 00000.tar\n- {path: more, weight: 2}\n")
    monkeypatch.chdir("/")
    assert names(str(folder / "data/sets.yml"), folder) == [(1.0, ["00000.tar"]), (2.0, ["more/00003.tar"])]


def test_size_and_time_identify_a_shard(folder):
    (shard,) = resolve_sources("data/00000.tar")[0].shards
    status = os.stat("data/00000.tar")
    assert (shard.size_bytes, shard.etag) == (status.st_size, f"mtime-{status.st_mtime_ns}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/0000.tar", "no such tar.*data/0000.tar.*Near it: .*data/00000.tar"),
        ("dta/00000.tar", "Near it: .*data"),
        ("data/*9.tar", "matches nothing"),
        ("data/{00000..00009}.tar", "data/00003.tar.* and 4 more of 10"),
        ("sets.yml", "there is no .*sets.yml"),
        (["data/00000.tar", "data/*.tar"], r"00000.tar is named twice \(entries 1 and 2\).*weight: 2"),
        ({"path": "data", "weight": 0}, "a number above 0, found 0"),
        ({"path": "data", "weight": 1e300}, "found 1e.300 .*write one from 0.001 to 1000"),
        ({"path": {"path": "data", "weight": 500}, "weight": 500}, "found 500 .*from 0.001 to 1000"),
        ("data/{00000..00009..0}.tar", "not a valid range: write"),
        ({"path": "data", "wieght": 2}, "expected {path"),
        (5, "found 5"),
        ([], "names no tar"),
        ("pipe:cat data/00000.tar", "commands are never run"),
        ("s3:bucket/00000.tar", "looks like s3://bucket/folder"),
        ("https://host/00000.tar", "https: URLs"),
        ("data/{0..99999999}.tar", "stands for 100000000 paths"),
    ],
)
def test_a_path_that_leads_nowhere_is_explained(folder, path, message):
    with pytest.raises(UserError, match=message):
        resolve_sources(path)


def test_a_folder_without_tars_and_a_compressed_tar_are_explained(folder):
    (folder / "empty").mkdir()
    (folder / "data.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no \.tar"):
        resolve_sources("empty")
    with pytest.raises(UserError, match="compressed"):
        resolve_sources("data.tar.gz")


@pytest.mark.parametrize("path", ["data", "data/*"])
def test_compressed_tars_beside_others_are_counted_and_named_with_the_remedy(folder, caplog, path):
    for name in ("00004.tar.gz", "00005.tgz", "00006.tar.bz2", "00007.tar.xz", "00008.tar.zst"):
        (folder / "data" / name).write_bytes(b"")
    (folder / "data" / "gone.tar.gz").symlink_to("nowhere")
    found = names(path, folder)[0][1]
    assert found == (ALL if path == "data" else ALL[:3])
    (record,) = caplog.records
    assert f"6 compressed ({folder}/data/00004.tar.gz, {folder}/data/00005.tgz, {folder}/data/0" in record.message
    assert record.message.endswith("...), so their samples can't be read singly; decompress them")


@pytest.mark.parametrize("path", ["only", "only/*"])
def test_where_there_are_only_compressed_tars_the_error_says_so(folder, path):
    (folder / "only").mkdir()
    (folder / "only" / "1.tar.zst").write_bytes(b"")
    told = rf"holds no \.tar but 1 compressed \({folder}/only/1\.tar\.zst\), .*decompress them"
    with pytest.raises(UserError, match=told):
        resolve_sources(path)


def test_a_missing_tar_is_a_file_not_found_error_too(folder):
    with pytest.raises(FileNotFoundError):
        resolve_sources("nowhere.tar")


@pytest.mark.parametrize("path", ["odd[1]/0.tar", "odd[1]", "odd[1]/*.tar", "odd[1]/{{0,1}}.tar", "odd[1]/[0-1].tar"])
def test_brackets_in_a_name_that_is_there_are_no_pattern(folder, path):
    (folder / "odd[1]").mkdir()
    for name in "01":
        write_shard(folder / f"odd[1]/{name}.tar", 1)
    path = path.format()
    found = [shard.url.rpartition("/")[2] for shard in resolve_sources(path)[0].shards]
    assert found == (["0.tar"] if path.endswith("/0.tar") else ["0.tar", "1.tar"])
    assert named_folders(path) == [f"{folder}/odd[1]"]
    assert folders_named_whole(path) == ([f"{folder}/odd[1]"] if path == "odd[1]" else [])
    assert named_folders("odd[12]/*.tar") == [str(folder)]


def test_a_million_paths_of_which_none_is_there_end_soon(folder):
    with bounded(folder), pytest.raises(UserError, match=r"no such tar: .* and 9997 more of 10000 \(from .*Near it"):
        resolve_sources("data/0" + "{0,1}" * 20 + ".tar")
    with bounded(folder), pytest.raises(UserError, match=r"data/00000\.tar is named twice"):
        resolve_sources("data/0000" + "{,}" * 20 + "0.tar")


@pytest.mark.parametrize(("path", "expected"), [("data/**/*.tar", ALL), ("dat?/**", ALL), ("**/more/*.tar", ALL[3:])])
def test_links_that_lead_in_circles_are_followed_once(folder, path, expected):
    for name in "abcdef":
        (folder / "data" / name).symlink_to(".")
        (folder / "data" / "more" / name).symlink_to("..")
    with bounded(folder):
        assert names(path, folder) == [(1.0, expected)]


def test_a_glob_in_which_no_set_of_letters_is_one_is_refused():
    with pytest.raises(UserError, match=r"data/\*\*/\[9-0\].*no set of letters"):
        matching(["a"], "data/**/[9-0]")


@pytest.mark.parametrize("name", ['"a\\0.tar"', '"a\\ud800.tar"'])
def test_a_name_that_no_file_can_have_is_refused(folder, name):
    (folder / "sets.yml").write_text(f"- {name}\n")
    with pytest.raises(UserError, match="expected a path, URL or list of those, found 'a"):
        resolve_sources("sets.yml")


def test_a_yml_that_grows_by_aliases_is_refused(folder):
    lines = [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(12)]
    (folder / "sets.yml").write_text("\n".join(lines))
    with bounded(folder), pytest.raises(UserError, match=r"sets\.yml is not valid YAML.*aliases of aliases"):
        resolve_sources("sets.yml")


def test_ranges_are_read_exactly(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(range(100)))
    assert read_ranges(str(path), [(90, 10), (0, 2), (5, 0)]) == [bytes(range(90, 100)), b"\0\1", b""]
    with pytest.raises(ChangedShardError, match="changed while it was in use"):
        read_ranges(str(path), [(95, 6)])


def test_a_passing_io_fault_is_tried_again_and_a_lasting_one_raised(tmp_path, monkeypatch):
    calls = []

    class Flaky(storage.LocalStorage):
        def read_ranges(self, url, ranges, version):
            calls.append(url)
            if len(calls) < 3 or "dead" in url:
                raise OSError("fault")
            return super().read_ranges(url, ranges, version)

    monkeypatch.setitem(storage._STORAGES, "file", Flaky)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    path = tmp_path / "x.tar"
    path.write_bytes(b"abc")
    assert read_ranges(str(path), [(0, 3)]) == [b"abc"]
    with pytest.raises(OSError, match="fault"):
        read_ranges(str(tmp_path / "dead.tar"), [(0, 1)])
    assert len(calls) == 6


@pytest.mark.parametrize("odd", ["run[1]", "run{1,2}", "run*"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, odd):
    folder = tmp_path / odd
    folder.mkdir()
    for name in ("a", "b[1]", "c{1,2}"):
        write_shard(folder / f"{name}.tar", 1)
    monkeypatch.chdir(folder)
    assert names("a.tar", folder.parent) == names(str(folder / "a.tar"), folder.parent)
    for path in ("a.tar", "b[1].tar", "c{1,2}.tar", str(folder / "b[1].tar")):
        (source,) = resolve_sources(path)
        assert [shard.url for shard in source.shards] == [str(folder / path)]
    for path in (str(folder), ".", "*.tar", "[abc]*.tar"):
        assert len(resolve_sources(path)[0].shards) == 3, path


def test_links_in_a_folder_are_followed_once_and_dead_ones_named(folder):
    (folder / "data/more/loop").symlink_to(folder / "data")
    (folder / "data/dead").symlink_to(folder / "nowhere")
    assert names("data", folder) == [(1.0, ALL)]
    (folder / "data/dead.tar").symlink_to(folder / "nowhere")
    for path in ("data", "data/*.tar"):
        with pytest.raises(UserError, match=r"dead\.tar is a link that leads nowhere"):
            resolve_sources(path)
    (folder / "data/dead.tar").unlink()
    (folder / "data/self.tar").symlink_to(folder / "data/self.tar")
    with pytest.raises(UserError, match=r"self\.tar is a link that leads nowhere"):
        resolve_sources("data")
    with pytest.raises(UserError, match="no such tar"):
        resolve_sources("data/self.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- [a.tar", "sets.yml is not valid YAML"),
        (b"- caf\xe9.tar", "sets.yml is not UTF-8 text"),
        (b"- {path: sets.yml}", "sets.yml names another .yml, sets.yml"),
        (b"- [[sets.yml]]", "names another .yml"),
    ],
)
def test_a_yml_that_can_not_be_used_is_explained(folder, content, message):
    (folder / "sets.yml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        resolve_sources("sets.yml")


def test_a_tar_of_another_version_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"abc")
    version = storage.storage_for(str(path)).stat(str(path))
    assert read_ranges(str(path), [(0, 3)], version) == [b"abc"]
    with pytest.raises(ChangedShardError):
        read_ranges(str(path), [(0, 3)], (3, "mtime-0"))
    with pytest.raises(ChangedShardError):
        read_ranges(str(path), [(0, 3)], (4, version[1]))
    error = pickle.loads(pickle.dumps(ChangedShardError("x.tar")))
    assert str(error) == str(ChangedShardError("x.tar")), "it travels from a worker"
