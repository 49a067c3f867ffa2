import io
import posixpath
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.warpcore.data.tars import catalog_of, picture, write_tar
from warpcore.data.buckets import Buckets
from warpcore.data.index import read_rows
from warpcore.data.plan import Plan
from warpcore.data.tars import read_samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def extracted(content: bytes) -> dict[str, dict[str, bytes]]:
    """The model: what `tar -x` leaves behind, by key and extension in lower case; not the keys that two share."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            files[posixpath.normpath(member.name).lstrip("/")] = tar.extractfile(member).read()
    samples: dict[str, dict[str, bytes]] = {}
    shared = set()
    for name, data in files.items():
        key, extension = name.split(".", 1)
        if extension.lower() in samples.setdefault(key, {}):
            shared.add(key)
        samples[key][extension.lower()] = data
    return {key: members for key, members in samples.items() if key not in shared}


NAMES = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "./", "/", ".//", "d/", "d//", "d/./"]),
    st.sampled_from("ab"),
    st.sampled_from(["jpg", "JPG", "txt", "png"]),
)


@given(st.lists(NAMES, min_size=1, max_size=10))
def test_members_belong_together_as_tar_extracts_them(names):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(str(number))
            tar.addfile(info, io.BytesIO(str(number).encode()))
    data = content.getvalue()
    samples = read_samples(io.BytesIO(data), "x.tar", len(data))
    found = {
        posixpath.normpath(sample.key).lstrip("/"): {
            extension: data[offset : offset + size] for extension, (offset, size) in sample.members.items()
        }
        for sample in samples
        if not sample.problem
    }
    assert found == extracted(data)


def captions_of(path) -> dict[str, bytes]:
    catalog = catalog_of(path)
    content = path.read_bytes()
    captions = {}
    for row in read_rows(catalog.shard(0)).to_pylist():
        spans = zip(row["member_offsets"], row["member_sizes"], strict=True)
        spans = dict(zip(row["member_names"], spans, strict=True))
        if not row["problem"]:
            offset, size = spans["txt"]
            captions[row["key"]] = content[offset : offset + size]
    return captions


def test_a_picture_never_gets_the_caption_of_another_one_of_its_key(tmp_path):
    first, second = picture(16), picture(24)
    members = [("0.jpg", first), ("1.jpg", first), ("0.jpg", second), ("0.txt", b"first"), ("1.txt", b"one"),
               ("0.txt", b"second")]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert captions_of(path) == {"0": b"second", "1": b"one"}
    assert [row["width"] for row in read_rows(catalog_of(path).shard(0)).to_pylist()] == [24, 16]


def test_of_pictures_of_two_kinds_none_gets_the_caption_of_the_other(tmp_path):
    members = [("0.jpg", picture(16)), ("0.txt", b"of the .jpg"), ("1.jpg", picture()), ("1.txt", b"one"),
               ("0.png", picture(24)), ("0.txt", b"of the .png"), ("2.jpg", picture()), ("2.png", picture()),
               ("2.txt", b"two"), ("2.jpg", picture())]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert captions_of(path) == {"1": b"one", "2": b"two"}
    problems = {row["key"]: row["problem"] for row in read_rows(catalog_of(path).shard(0)).to_pylist()}
    assert problems["0"] == "two samples share a key: 0.jpg and 0.png, with two 0.txt"


@pytest.mark.integration
def test_a_caption_that_tar_replaced_is_the_one_that_counts(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0000.jpg", picture()), ("0000.txt", b"old"), ("1.jpg", picture())])
    (tmp_path / "0000.txt").write_bytes(b"new")
    subprocess.run(["tar", "-rf", "x.tar", "0000.txt"], cwd=tmp_path, check=True)
    (tmp_path / "1.txt").write_bytes(b"late")
    subprocess.run(["tar", "-rf", "x.tar", "./1.txt"], cwd=tmp_path, check=True)
    assert captions_of(path) == {"0000": b"new", "1": b"late"}


def test_two_samples_of_one_key_are_both_refused_by_name_and_counted(tmp_path, caplog):
    members = [("0000.jpg", picture()), ("0000.txt", b"x"), ("0000.JPG", picture(9)), ("1.JPG", picture()),
               ("1.txt", b"y")]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    assert captions_of(path) == {"1": b"y"}
    assert "2 samples can't be used: two samples share a key: 0000.jpg and 0000.JPG" in caplog.text
    survey = str(Plan(catalog_of(path), micro_batch_size=1, buckets=Buckets.for_image_size(64, [], 32)).survey)
    assert "1 of 3 rows can be drawn; 2 rejected: two samples share a key" in survey
    assert "0000.jpg and 0000.JPG" in survey


def test_a_picture_that_dots_in_its_name_hide_is_named_counted_and_explained(tmp_path):
    names = ["Screenshot 2026-01-01 at 09.11.05", "Screenshot 2026-01-02 at 10.11.06", "plain"]
    path = write_tar(tmp_path / "x.tar", [(f"{name}.jpg", picture()) for name in names])
    survey = str(Plan(catalog_of(path), micro_batch_size=1, buckets=Buckets.for_image_size(64, [], 32)).survey)
    assert "1 of 3 rows can be drawn; 2 rejected: dots in the name of a picture" in survey
    assert "Screenshot 2026-01-01 at 09.11.05.jpg is read as the member .11.05.jpg" in survey
    assert "build_dataset.py" in survey


def survey_of(path) -> str:
    return str(Plan(catalog_of(path), micro_batch_size=1, buckets=Buckets.for_image_size(64, [], 32)).survey)


def test_pictures_that_dots_merge_into_the_row_of_another_one_are_named_and_counted(tmp_path):
    names = ["photo.jpg", "photo.edit.jpg", "photo.2.jpg", "a.b.jpg", "a.c.jpg", "plain.jpg"]
    survey = survey_of(write_tar(tmp_path / "x.tar", [(name, picture()) for name in names]))
    assert "2 of 3 rows can be drawn; 3 rejected: dots in the name of a picture" in survey
    assert "a.b.jpg is read as the member .b.jpg of the key 'a', as are 1 more of this key" in survey
    survey = survey_of(write_tar(tmp_path / "y.tar", [(name, picture()) for name in names[:3]]))
    assert "1 of 1 rows can be drawn; 2 rejected: dots in the name of a picture" in survey
    assert "photo.edit.jpg is read as the member .edit.jpg of the key 'photo', as are 1 more of this key" in survey


def test_members_of_their_own_kind_beside_a_picture_are_no_hidden_pictures(tmp_path):
    names = [f"{number}.{kind}" for number in range(40) for kind in ("jpg", "condition.png")]
    names += ["3.mask.png", "4.depth.png", "5.seg.png", "6.pose.json"]
    survey = survey_of(write_tar(tmp_path / "x.tar", [(name, picture()) for name in names]))
    assert "rejected" not in survey
    names += ["0.a.jpg", "1.a.jpg"]
    assert "2 rejected: dots in the name" in survey_of(
        write_tar(tmp_path / "y.tar", [(name, picture()) for name in names])
    )


def test_a_json_that_a_link_replaces_gives_no_fields(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("0.jpg", picture()), ("0.json", b'{"score": 1}'), ("1.json", b'{"score": 2}')])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0.json")
        link.type, link.linkname = tarfile.SYMTYPE, "1.json"
        tar.addfile(link)
    rows = read_rows(catalog_of(path).shard(0)).to_pylist()
    assert [row["json.score"] for row in rows] == [None, 2]
