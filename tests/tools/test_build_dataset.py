import csv
import errno
import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset

from tests.warpcore.data.tars import picture
from tools.build_dataset import build_dataset, main, parse_bytes
from warpcore.data.catalog import MANIFEST_NAME, open_catalog, write_manifests
from warpcore.data.index import INDEX_SUFFIX, read_rows
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    files = {
        "a.jpg": picture(),
        "a.txt": b"a bear",
        "a.json": b'{"score": 5}',
        "nested/B.JPEG": picture(20, 10),
        "nested/B.TXT": b"a cat\n",
        "nested/c.v1.png": picture(8, 8, "PNG"),
        "nested/c_v1.webp": picture(30, 30, "WEBP"),
        "same.png": picture(kind="PNG"),
        "same.jpg": picture(),
        "cut.jpg": picture(200, 200)[:-2000],
        "empty.png": b"",
        "fake.jpg": b"text",
        "latin.jpg": picture(),
        "latin.txt": b"\xfcber",
        "broken.jpg": picture(),
        "broken.json": b"{",
        "notes.md": b"",
        ".hidden/x.jpg": picture(),
        "._a.jpg": b"",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def samples_of(out: Path) -> dict[str, dict]:
    """What webdataset reads."""
    urls = sorted(str(path) for path in out.glob("*.tar"))
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}


def test_pictures_become_samples_with_what_belongs_to_them(folder, tmp_path):
    report = build_dataset(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert set(samples) == {"a", "nested/B", "nested/c_v1", "nested/c_v1_2", "same"}
    assert samples["a"]["jpg"] == (folder / "a.jpg").read_bytes()
    assert (samples["a"]["txt"], samples["a"]["json"]) == (b"a bear", b'{"score": 5}')
    assert samples["nested/B"]["jpeg"] == picture(20, 10)
    assert samples["nested/B"]["txt"] == b"a cat\n"
    assert "jpg" in samples["same"]
    assert sorted(report.sizes) == [(8, 8), (16, 12), (16, 12), (20, 10), (30, 30)]


def test_what_is_skipped_is_told_with_the_reason(folder, tmp_path, capsys):
    main([str(folder), str(tmp_path / "out")])
    told = capsys.readouterr().out
    for line in (
        "kept 5 pictures in 1 tar (",
        "no caption: 3 (nested/c_v1.webp, nested/c.v1.png, same.jpg); training",
        "left out 9",
        "1 no picture (.md): notes.md",
        "2 hidden (its name begins with a dot): ",
        "1 of the same name as another picture (same): same.png",
        "1 empty file: empty.png",
        "1 unreadable (it is no picture in a known format): fake.jpg",
        "1 caption is not UTF-8: latin.jpg",
        "1 .json is not JSON: broken.jpg",
        "megapixels: smallest 6.4e-05, median 0.00019, largest 0.0009",
        f"to look at it: python3 tools/inspect_dataset.py {tmp_path / 'out'} data.html",
        f"webdataset_path={tmp_path / 'out'}",
    ):
        assert line in told
    assert ": cut.jpg" in told
    histogram = {line.split()[0]: int(line.split()[1]) for line in told.splitlines() if line.endswith("#")}
    assert histogram == {"1:1": 2, "4:3": 2, "16:9": 1}


def test_the_tars_come_with_an_index_and_a_manifest(folder, tmp_path):
    out = tmp_path / "out"
    build_dataset(folder, out, samples_per_shard=2)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(list(out.glob(f"*{INDEX_SUFFIX}"))) == 3
    assert (out / MANIFEST_NAME).exists()
    catalog = open_catalog(resolve_sources(str(out)))
    rows = [row for number in range(3) for row in read_rows(catalog.shard(number)).to_pylist()]
    assert {row["key"]: (row["width"], row["height"]) for row in rows}["nested/B"] == (20, 10)
    assert catalog.rows.tolist() == [2, 2, 1]


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    digests = []
    for name in ("one", "two"):
        build_dataset(folder, tmp_path / name, samples_per_shard=2)
        digests.append(
            [hashlib.sha256(path.read_bytes()).digest() for path in sorted((tmp_path / name).glob("*.tar"))]
        )
        (folder / "a.jpg").touch()
    assert digests[0] == digests[1]


def test_shards_can_be_bounded_by_size(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(picture(64, 64))
    build_dataset(folder, tmp_path / "out", shard_size_bytes=20_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 3
    assert all(20_000 <= size < 40_000 for size in sizes[:-1])


def test_captions_come_from_metadata_where_there_is_no_txt(folder, tmp_path):
    lines = [
        {"file_name": "a.jpg", "text": "not taken", "extra": 1, "score": 7},
        {"file_name": "nested/c.v1.png", "text": "a square", "score": 3},
        {"file_name": "gone.png", "text": "x"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with (folder / "nested/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "score", "note"], ["c_v1.webp", "a disc", "2.5", ""]])
    report = build_dataset(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert samples["a"]["txt"] == b"a bear"
    assert json.loads(samples["a"]["json"]) == {"extra": 1, "score": 5}
    assert samples["nested/c_v1"]["txt"] == b"a square"
    assert samples["nested/c_v1_2"]["txt"] == b"a disc"
    assert json.loads(samples["nested/c_v1_2"]["json"]) == {"score": 2.5}
    assert [Path(name).name for name in report.left_out.files["in the metadata but not in the folder"]] == ["gone.png"]


def test_captions_and_names_that_look_like_numbers_stay_as_they_are(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "007.jpg").write_bytes(picture())
    (folder / "metadata.csv").write_text("file_name,caption,score\n007.jpg,007,007\n")
    build_dataset(folder, tmp_path / "out")
    sample = samples_of(tmp_path / "out")["007"]
    assert (sample["txt"], json.loads(sample["json"])) == (b"007", {"score": 7})


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_the_keys_of_img2dataset_name_pictures(tmp_path, name):
    folder = tmp_path / "pictures"
    (folder / "00000").mkdir(parents=True)
    (folder / "00000/000000012.jpg").write_bytes(picture())
    lines = {
        "metadata.csv": "url,key,caption,width\nx,000000012,a bear,9\n",
        "metadata.jsonl": json.dumps({"url": "x", "key": "000000012", "caption": "a bear", "width": 9}),
    }
    (folder / name).write_text(lines[name])
    report = build_dataset(folder, tmp_path / "out")
    assert not report.left_out
    sample = samples_of(tmp_path / "out")["00000/000000012"]
    assert (sample["txt"], json.loads(sample["json"])) == (b"a bear", {"url": "x", "width": 9})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"text": "x"}', "line 1: no file_name; it has: text"),
        ("metadata.jsonl", '\n{"file_name"', "line 2: it is not JSON"),
        ("metadata.csv", "url,text\nx,y\n", "line 2: no file_name; it has: url, text"),
        ("metadata.csv", "file_name,text\na.jpg,a dog, running\n", "line 2: 1 values more.*' running'.*quotes"),
        ("metadata.csv", "file_name,text\na.jpg,\udcfcber\n", "not UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": ["x"]}', "line 1: the caption is not text"),
    ],
)
def test_a_metadata_file_of_another_form_is_explained(folder, tmp_path, name, text, message):
    (folder / name).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        build_dataset(folder, tmp_path / "out")


def test_a_folder_that_holds_something_is_not_overwritten_unasked(folder, tmp_path):
    out = tmp_path / "out"
    build_dataset(folder, out, samples_per_shard=1)
    (out / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        build_dataset(folder, out)
    build_dataset(folder, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar",
        f"00000.tar{INDEX_SUFFIX}",
        MANIFEST_NAME,
        "keep.txt",
    ]


def test_a_folder_without_usable_pictures_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable picture"):
        build_dataset(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="not a folder"):
        build_dataset(tmp_path / "nowhere", tmp_path / "out2")


def test_sizes_are_written_as_people_write_them():
    assert [parse_bytes(text) for text in ("500MB", "2 GB", "1.5k", "7")] == [500_000_000, 2_000_000_000, 1500, 7]


def _tars_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


def test_wherever_a_replacement_is_killed_the_old_data_set_is_there_or_the_next_start_makes_the_new_one_whole(
    folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    build_dataset(folder, out, samples_per_shard=1)
    old = _tars_of(out)
    (out / "notes.txt").write_text("mine")
    (folder / "a.jpg").write_bytes(picture(50, 40))
    moments = []

    def after_a_moment(change):
        def changed(*arguments, **named):
            moments.append(tmp_path / f"moment{len(moments)}")
            shutil.copytree(out, moments[-1])
            return change(*arguments, **named)

        return changed

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, after_a_moment(getattr(os, name)))
        build_dataset(folder, out, samples_per_shard=2, overwrite=True)
    new = _tars_of(out)
    assert (len(old), len(new)) == (5, 3)
    seen = []
    for moment in moments:
        is_begun = (moment / ".building" / ".swap.json").exists()
        with pytest.raises(UserError, match="is not empty"):
            build_dataset(folder, moment)
        found = _tars_of(moment)
        assert found == new if is_begun else found in (old, new)
        assert {path.name for path in moment.glob("*.index.parquet")} == {f"{name}.index.parquet" for name in found}
        assert open_catalog(resolve_sources(str(moment))).num_rows == 5
        assert (moment / "notes.txt").read_text() == "mine"
        assert not (moment / ".building" / ".swap.json").exists()
        seen.append(is_begun)
    assert sum(seen) > 10, "most steps are of the swap"


@pytest.mark.parametrize("names", [["../x.tar"], ["notes.txt"], [1], None])
def test_a_swap_that_names_other_files_is_refused(folder, tmp_path, names):
    aside = tmp_path / "out" / ".building"
    aside.mkdir(parents=True)
    (tmp_path / "x.tar").write_text("mine")
    (aside / ".swap.json").write_text(json.dumps({"new": [], "old": names}))
    with pytest.raises(UserError, match="names files that no build writes: remove"):
        build_dataset(folder, tmp_path / "out")
    assert (tmp_path / "x.tar").exists()


def test_a_swap_goes_through_no_link(folder, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    for made in (elsewhere, out):
        made.mkdir()
    (elsewhere / "00000.tar").write_text("mine")
    (elsewhere / ".swap.json").write_text(json.dumps({"new": ["00000.tar"], "old": []}))
    (out / ".building").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"\.building is a link, and tars are put together in a folder of that name"):
        build_dataset(folder, out)
    assert sorted(path.name for path in elsewhere.iterdir()) == [".swap.json", "00000.tar"]


def test_a_swap_that_the_disk_refuses_is_finished_by_the_next_start(folder, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def refused(source, target):
        if Path(target).name == "00001.tar":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(PermissionError):
            build_dataset(folder, out, samples_per_shard=2)
    with pytest.raises(UserError, match="is not empty"):
        build_dataset(folder, out, samples_per_shard=2)
    assert len(samples_of(out)) == 5


def test_a_killed_build_leaves_no_tar_under_its_final_name(folder, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "close", fail)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["no pictures", "broken metadata", "killed"])
def test_what_is_there_stays_until_the_new_tars_are_whole(folder, tmp_path, monkeypatch, fault):
    out = tmp_path / "out"
    build_dataset(folder, out, samples_per_shard=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if fault == "no pictures":
        folder = tmp_path / "none"
        folder.mkdir()
    elif fault == "broken metadata":
        (folder / "metadata.jsonl").write_text("{")
    else:
        monkeypatch.setattr("tools.build_dataset.write_manifests", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises((UserError, KeyboardInterrupt)):
        build_dataset(folder, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_second_build_into_the_same_folder_is_refused_and_the_first_one_goes_on(folder, tmp_path, monkeypatch):
    def build_again(*arguments):
        with pytest.raises(UserError, match="out: another process builds a data set there"):
            build_dataset(folder, tmp_path / "out")
        write_manifests(*arguments)

    monkeypatch.setattr("tools.build_dataset.write_manifests", build_again)
    build_dataset(folder, tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "00000.tar",
        f"00000.tar{INDEX_SUFFIX}",
        MANIFEST_NAME,
    }


def test_an_out_that_is_a_file_is_explained(folder, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"):
        build_dataset(folder, tmp_path / "out", overwrite=True)


def test_odd_pictures_are_kept_or_skipped_with_a_reason(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "thin.jpg").write_bytes(picture(300, 3))
    for number in range(3):
        (folder / f"cut{number}.jpg").write_bytes(picture(200, 200)[: -2000 - 100 * number])
    (folder / "dead.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    report = build_dataset(folder, tmp_path / "out")
    assert report.sizes == [(300, 3)]
    assert {reason: len(files) for reason, files in report.left_out.files.items()} == {
        "unreadable (the JPEG is cut off: it has no end marker)": 3,
        "a link that leads nowhere": 2,
        "empty file": 1,
    }
    str(report).encode()
