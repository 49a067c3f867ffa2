"""What lies beside pictures goes with them, every picture that can be read is found, and what is left out is named."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from families.cascade.controlnet import filter_fields
from families.common.members import MASK, SIDE_MEMBERS
from families.common.sample_fields import MaskField
from modules.filters import FILTERS
from tests.tools.test_build_dataset import samples_of
from tests.warpcore.data.tars import picture
from tools.build_dataset import build_dataset, main
from warpcore.data.picture_files import PICTURE_EXTENSIONS
from warpcore.data.samples import COMMON_KINDS, picture_member
from warpcore.errors import UserError

POSE = json.dumps({"people": [{"pose_keypoints_2d": [1, 2, 1] * 18}]}).encode()


@pytest.fixture
def build(tmp_path):
    """Builds a folder of these files; gives the samples as webdataset reads them, and the report."""

    def build(files: dict[str, bytes], **settings):
        folder = tmp_path / "pictures"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        report = build_dataset(folder, tmp_path / "out", **settings)
        return samples_of(tmp_path / "out"), report

    return build


def encoded(mode: str, kind: str, seed: int = 0, **saving) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16) + ((3,) if mode == "RGB" else ()), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels, mode).save(content, kind, **saving)
    return content.getvalue()


def test_classes_go_with_their_picture(build):
    """Those of another picture, or of none, and those that are no text are named."""
    files = {
        "a.png": encoded("RGB", "PNG"),
        "a.cls": b"7\n",
        "b.png": encoded("RGB", "PNG", 1),
        "b.cls": "né".encode(),
        "c.cls": b"1",
    }
    samples, report = build(files | {"d.png": encoded("RGB", "PNG", 2), "d.cls": b"\xff"})
    assert {key: sample.get("cls") for key, sample in samples.items()} == {"a": b"7", "b": "né".encode()}
    assert report.left_out.files == {
        "a .cls without a picture, or a second one": ["c.cls"], ".cls is not UTF-8": ["d.png"],
    }  # fmt: skip


def test_masks_depths_segments_and_poses_go_with_their_picture(build):
    beside = {"depth.png": encoded("L", "PNG"), "seg.png": encoded("RGB", "PNG"), "pose.json": POSE}
    beside["mask.png"] = encoded("L", "PNG", seed=1)
    files = {f"a.{member}": content for member, content in beside.items()}
    samples, report = build({"a.jpg": picture(), "a.txt": b"a dog", "b.jpg": picture()} | files)
    assert set(samples) == {"a", "b"}
    assert {member: samples["a"][member] for member in beside} == beside
    assert report.members["mask.png"] == report.members["pose.json"] == 1
    assert "beside them: 1 .mask.png, 1 .depth.png, 1 .pose.json, 1 .seg.png" in str(report)


def test_captions_may_lie_in_a_folder_of_their_own_and_pickled_text_features_are_recreated(build):
    """The layout of Cosmos: `images`, `metas` and `t5_xxl`, here of two data sets in one folder."""
    files = {
        "one/images/a.jpg": picture(), "one/images/b.PNG": picture(kind="PNG"), "one/images/c.jpg": picture(),
        "one/metas/a.txt": b"a dog", "one/metas/b.txt": b"a cat\n", "one/metas/d.txt": b"nobody",
        "one/t5_xxl/a.pickle": b"code", "one/t5_xxl/b.pickle": b"code",
        "two/images/a.jpg": picture(), "two/images/a.txt": b"its own", "two/metas/a.txt": b"another",
        "metas/a.txt": b"beside no pictures",
    }  # fmt: skip
    samples, report = build(files)
    assert {key: sample.get("txt") for key, sample in samples.items()} == {
        "one/images/a": b"a dog", "one/images/b": b"a cat\n", "one/images/c": None, "two/images/a": b"its own",
    }  # fmt: skip
    told = str(report)
    for line in (
        "captions of the pictures in one/images: those of one/metas (3)",
        "captions of the pictures in two/images: those of two/metas (1)",
        "no caption: 1 (one/images/c.jpg)",
        "3 a caption without a picture, or a second one: ",
        "2 a pickle, which can run code and is never read: where it holds text features, make them from the captions "
        "with python3 tools/cache.py SCRIPT CONFIG OUT --features texts: one/t5_xxl/a.pickle, one/t5_xxl/b.pickle",
    ):
        assert line in told


def test_a_caption_of_a_mask_makes_no_picture_of_it(build):
    files = {"a.jpg": picture(), "a.mask.png": encoded("L", "PNG"), "a.mask.txt": b"a white blob"}
    samples, report = build(files)
    assert set(samples) == {"a"}
    assert report.left_out.files == {"a caption without a picture, or a second one": ["a.mask.txt"]}


def test_a_folder_of_masks_is_told(build):
    samples, report = build({"a.jpg": picture(), "masks/a.png": encoded("L", "PNG")})
    assert set(samples) == {"a", "masks/a"}
    assert "folders named as for masks (masks): they are packed as pictures. The mask of NAME.jpg lies" in str(report)


def test_every_member_that_a_reader_looks_at_is_known():
    looked_at = {name for kind in FILTERS.values() for name in (filter_fields(kind()) if _plain(kind) else ())}
    assert looked_at | {MASK} == set(SIDE_MEMBERS)
    assert MaskField((MASK,)).suffixes[0] in SIDE_MEMBERS
    pictures = {member for member in SIDE_MEMBERS if not member.endswith(".json")}
    assert pictures == set(COMMON_KINDS), "or a few masks in a tar would be taken for hidden pictures"


def _plain(kind) -> bool:
    """Whether a filter can be made here without a network's weights."""
    return kind.member is not None or "member" in kind.__init__.__code__.co_varnames


@pytest.mark.parametrize("name", ["A.MASK.PNG", "A.mask.webp", "A.Mask.tif", "A.mask.bmp", "A-masklabel.png"])
def test_a_mask_of_any_picture_format_becomes_what_readers_look_for(build, name):
    kind = {"PNG": "PNG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}[name.rpartition(".")[2]]
    mask = encoded("RGB", kind, **({"lossless": True} if kind == "WEBP" else {}))
    samples, report = build({"A.jpg": picture(), name: mask})
    assert set(samples) == {"A"}
    with Image.open(io.BytesIO(samples["A"]["mask.png"])) as packed, Image.open(io.BytesIO(mask)) as given:
        assert packed.format == "PNG"
        assert np.array_equal(packed.convert("RGB"), given.convert("RGB"))
    assert not report.left_out


def test_a_mask_by_its_name_here_comes_before_one_by_another_trainers(build):
    own, other = encoded("RGB", "PNG"), encoded("L", "PNG")
    samples, report = build({"A.jpg": picture(), "A-masklabel.png": other, "A.mask.png": own})
    assert samples["A"]["mask.png"] == own != other
    assert [str(name) for names in report.left_out.files.values() for name in names] == ["A-masklabel.png"]


def test_a_mask_that_cannot_be_used_is_told_with_its_picture(build):
    wide = io.BytesIO()
    Image.new("L", (40, 12)).save(wide, "PNG")
    files = {"a.jpg": picture(), "b.jpg": picture(), "c.jpg": picture(), "d.jpg": picture()}
    files |= {"a.mask.png": b"", "b.mask.png": wide.getvalue(), "c.pose.json": b"[]"}
    samples, report = build(files)
    assert set(samples) == {"d"}
    assert sorted(name for names in report.left_out.files.values() for name in names) == ["a.jpg", "b.jpg", "c.jpg"]
    assert "its .mask.png can't be used" in str(report)
    assert "its .pose.json can't be used" in str(report)


def test_further_kinds_of_pictures_beside_pictures_can_be_named(build, tmp_path):
    files = {"a.jpg": picture(), "a.normal.png": encoded("RGB", "PNG")}
    samples, _ = build(files, extra=["normal"])
    assert set(samples) == {"a"}
    assert "normal.png" in samples["a"]


def test_every_picture_that_can_be_decoded_is_taken(build):
    kinds = {"tif": "TIFF", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "avif": "AVIF", "jfif": "JPEG", "jpg": "JPEG"}
    kinds |= {
        "jpeg": "JPEG",
        "png": "PNG",
        "webp": "WEBP",
        "jpe": "JPEG",
        "jp2": "JPEG2000",
        "ppm": "PPM",
        "tga": "TGA",
    }
    kinds |= {"qoi": "QOI"}
    assert set(kinds) == set(PICTURE_EXTENSIONS)
    samples, report = build({f"{name}.{name.upper()}": encoded("RGB", kind) for name, kind in kinds.items()})
    assert set(samples) == set(kinds)
    assert all(picture_member(samples[name]) == name for name in kinds)
    assert not report.left_out


def test_what_is_left_out_is_counted_by_reason_with_names(build):
    names = ["b.heic", "c.HEIF", "d.txt", "e.json", "f.depth.png", "._a.jpg", ".cache/x.jpg", "clip.mp3", "Thumbs"]
    _, report = build({"a.jpg": picture()} | dict.fromkeys(names, b"x"))
    assert report.left_out.files == {
        "of a format that is not read (.heic): convert them to JPEG or PNG": ["b.heic"],
        "of a format that is not read (.heif): convert them to JPEG or PNG": ["c.HEIF"],
        "a caption without a picture, or a second one": ["d.txt"],
        "a .json without a picture, or a second one": ["e.json"],
        "a depth without a picture of its name, or a second one": ["f.depth.png"],
        "hidden (its name begins with a dot)": ["._a.jpg", ".cache"],
        "no picture (.mp3)": ["clip.mp3"],
        "no picture (no extension)": ["Thumbs"],
    }
    assert "left out 9" in str(report)


def test_linked_folders_are_walked_once_and_loops_end(tmp_path):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for path in (folder / "own/a.jpg", elsewhere / "deep/b.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(picture())
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "own")
    (elsewhere / "deep/loop").symlink_to(folder)
    (tmp_path / "pictures/metadata.jsonl").write_text('{"file_name": "linked/deep/b.jpg", "text": "a bear"}')
    report = build_dataset(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert set(samples) == {"own/a", "linked/deep/b"}
    assert samples["linked/deep/b"]["txt"] == b"a bear"
    assert report.left_out.files == {"a link to a folder that is listed already": ["again", "linked/deep/loop"]}


def test_pictures_may_be_written_beside_the_tars(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "shards").mkdir()
    report = build_dataset(tmp_path, tmp_path / "shards")
    assert not report.left_out
    report = build_dataset(tmp_path, tmp_path / "shards", overwrite=True)
    assert (len(report.sizes), len(report.left_out)) == (1, 0)


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        (["a.jpg.txt"], "a.jpg.txt"),
        (["a.caption"], "a.caption"),
        (["a.txt", "a.jpg.txt", "a.caption"], "a.txt"),
        (["a.jpg.txt", "a.caption"], "a.jpg.txt"),
    ],
)
def test_captions_have_the_names_that_taggers_give_them(build, files, caption):
    samples, report = build({"a.jpg": picture()} | {name: name.encode() for name in files})
    assert samples["a"]["txt"] == caption.encode()
    assert len(report.left_out) == len(files) - 1


def test_captions_are_stored_as_utf_8_and_empty_ones_are_named(build):
    files = {"a.txt": "naïve".encode("utf-8-sig"), "b.txt": "naïve".encode("utf-16"), "c.txt": b" \n", "d.txt": b""}
    files["a.json"] = '{"who": "ï"}'.encode("utf-8-sig")
    samples, report = build(files | {f"{name}.jpg": picture() for name in "abcd"})
    assert samples["a"]["txt"] == samples["b"]["txt"] == "naïve".encode()
    assert json.loads(samples["a"]["json"]) == {"who": "ï"}
    assert sorted(report.empty_captions) == ["c.jpg", "d.jpg"]
    assert "empty caption: 2 (" in str(report)


def test_captions_that_are_longer_than_clip_reads_are_counted(build, tmp_path, capsys):
    captions = {"fits": "dog " * 75, "long": "dog " * 76, "short": "x"}
    files = {f"{name}.txt": text.encode() for name, text in captions.items()}
    _, report = build(files | {f"{name}.jpg": picture() for name in captions})
    assert report.long_captions == ["long.jpg"]
    assert "longer than the 77 tokens that CLIP reads: 1 of 3 (long.jpg)" in str(report)
    main([str(tmp_path / "pictures"), str(tmp_path / "out2"), "--text-encoder", "none"])
    assert "CLIP" not in capsys.readouterr().out


def test_a_pipe_is_no_picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures/a.jpg")
    with pytest.raises(UserError, match=r"no usable picture or video: left out 1\n  1 no regular file: a\.jpg"):
        build_dataset(tmp_path / "pictures", tmp_path / "out")


def test_folders_named_with_repeats_as_for_kohyas_scripts_get_a_note(tmp_path):
    for name in ("10_a fox", "sub/3_cats", "2024_summer", "plain"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(picture(kind="PNG"))
    report = build_dataset(tmp_path / "set", tmp_path / "out")
    (note,) = report.notes
    assert "(set/10_a fox, set/sub/3_cats): each picture is packed once" in note
    assert "weight: 10" in note
    assert build_dataset(tmp_path / "set" / "plain", tmp_path / "plain").notes == []
