"""Videos in the index: columns, problems, filters, and indexes of earlier versions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from tests.warpcore.data.videos import sound, turned, video
from tests.warpcore.runs import tiny_settings, train_here
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import write_manifests
from warpcore.data.columns import column_types
from warpcore.data.filters import VIDEO_COLUMNS, Filter
from warpcore.data.index import INDEX_SUFFIX, Summary, read_rows, read_summary
from warpcore.data.plan import Plan
from warpcore.data.samples import VIDEO_EXTENSIONS, visual_member
from warpcore.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(catalog) -> dict[str, dict]:
    return {row["key"]: row for number in range(len(catalog)) for row in read_rows(catalog.shard(number)).to_pylist()}


def plan_of(catalog, **settings) -> Plan:
    buckets = Buckets.for_image_size(64, [], 8, 0.0)
    return Plan(catalog, micro_batch_size=1, buckets=buckets, **settings)


def mixed(path):
    """A picture and three videos, of 10, 20 and 20 frames at 25, 10 and 25 frames per second, the last one turned."""
    members = [
        ("a.jpg", picture(16, 12)), ("a.txt", b"a"), ("a.json", b'{"fps": 7, "score": 1.5}'),
        ("b.mp4", video(10)), ("b.txt", b"b"), ("b.json", b'{"fps": 7, "score": 2.5}'),
        ("c.webm", video(20, fps=10, codec="vp9", container="webm")), ("c.txt", b"c"),
        ("d.mov", turned(video(20, codec="hevc"), (0, 1, -1, 0))), ("d.txt", b"d"),
    ]  # fmt: skip
    return write_tar(path, members)


def test_videos_are_rows_with_what_their_headers_say(tmp_path):
    rows = rows_of(catalog_of(mixed(tmp_path / "a.tar")))
    assert all(row["problem"] is None for row in rows.values())
    assert [[row[name] for name in ("width", "height", *VIDEO_COLUMNS)] for row in rows.values()] == [
        [16, 12, None, None, None, None, None, None],
        [64, 48, 10, 25, pytest.approx(0.4), "h264", True, 0],
        [64, 48, 20, pytest.approx(10), pytest.approx(2), "vp9", True, 0],
        [48, 64, 20, 25, pytest.approx(0.8), "hevc", True, 90],
    ]


def test_samples_of_videos_bring_their_frames_along(tmp_path):
    samples = {one.key: one for one in plan_of(catalog_of(mixed(tmp_path / "a.tar"))).some_samples(100)}
    assert {key: (one.num_frames, round(one.fps, 3), one.is_video) for key, one in samples.items()} == {
        "a": (1, 0.0, False), "b": (10, 25.0, True), "c": (20, 10.0, True), "d": (20, 25.0, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        (["num_frames", "lambda n: n >= 20"], "cd"),
        (["fps", "lambda f: f > 20"], "bd"),
        (["fps", "lambda f: f == 7"], "a"),  # the .json of the picture; of b the video itself counts
        ([["seconds", "height"], "lambda s, h: s < 1 and h == 64"], "d"),
        (["codec", "lambda c: c in ('vp9', 'hevc')"], "cd"),
        (["constant_rate", "lambda c: c"], "bcd"),
        (["rotation", "lambda r: r == 90"], "d"),
        (["json", "lambda j: j['num_frames'] < 20"], "b"),
        (["json", "lambda j: j['fps'] == 25"], "bd"),
    ],
)
def test_filters_see_the_columns_of_videos(tmp_path, condition, kept):
    catalog = catalog_of(mixed(tmp_path / "a.tar"))
    plan = plan_of(catalog, filters=[Filter.parse(condition)])
    assert "".join(sorted(one.key for one in plan.some_samples(100))) == kept


def test_captions_and_batches_may_take_the_columns_of_videos(tmp_path):
    catalog = catalog_of(mixed(tmp_path / "a.tar"))
    types = column_types(catalog, ["num_frames", "fps", "codec", "constant_rate"])
    assert list(types.values()) == [pa.int64(), pa.float64(), pa.string(), pa.bool_()]
    getter = CaptionGetter.parse([["txt", "json.fps"], "lambda text, fps: text + ', ' + str(round(fps)) + ' fps'"])
    samples = plan_of(catalog, captions=getter, columns=column_types(catalog, getter.columns)).some_samples(100)
    captions = {one.key: getter({"txt": one.key.encode()}, one.columns) for one in samples}
    assert captions == {"a": "a, 7 fps", "b": "b, 25 fps", "c": "c, 10 fps", "d": "d, 25 fps"}


def test_what_stands_for_a_video_says_its_columns_as_far_as_it_can(tmp_path):
    size = {"width": 4, "height": 6, "num_frames": 5, "fps": 8.0}
    whole = {"seconds": 0.625, "codec": "vp9", "constant_rate": False, "rotation": 90}
    odd = {"seconds": -1, "codec": "\ud800", "constant_rate": 1, "rotation": 10**9}
    members = [(f"{key}.picture.json", json.dumps(facts).encode())
               for key, facts in (("a", size | whole), ("b", size | odd), ("c", size))]  # fmt: skip
    rows = rows_of(catalog_of(write_tar(tmp_path / "a.tar", members)))
    assert {name: rows["a"][name] for name in (*size, *whole)} == size | whole
    for key in "bc":
        assert {name: rows[key][name] for name in (*size, *whole)} == size | dict.fromkeys(whole)


def test_tars_of_pictures_have_no_columns_of_videos(tmp_path):
    catalog = catalog_of(write_shard(tmp_path / "a.tar", 3))
    assert not VIDEO_COLUMNS.keys() & set(read_rows(catalog.shard(0)).column_names)
    with pytest.raises(UserError, match="no sample has 'num_frames'"):
        plan_of(catalog, filters=[Filter.parse(["num_frames", "lambda n: n > 1"])])
    assert all(one.num_frames == 1 and not one.is_video for one in plan_of(catalog).some_samples(10))


def test_a_script_of_pictures_leaves_videos_out_and_counts_them(tmp_path):
    plan = plan_of(catalog_of(mixed(tmp_path / "a.tar")), videos=False)
    assert [one.key for one in plan.some_samples(100)] == ["a"]
    assert "3 rejected: a video, and this script takes pictures" in str(plan.survey)


def test_a_picture_comes_before_a_video_of_the_same_sample(tmp_path):
    assert [visual_member(names) for names in (["mp4", "jpg"], ["mkv", "txt", "mp4"], ["txt"])] == ["jpg", "mp4", None]
    rows = rows_of(catalog_of(write_tar(tmp_path / "a.tar", [("a.mp4", video()), ("a.jpg", picture(16, 12))])))
    assert (rows["a"]["width"], rows["a"]["num_frames"]) == (16, None)


@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS)
def test_the_content_says_what_a_video_is_and_not_its_extension(tmp_path, extension):
    rows = rows_of(catalog_of(write_tar(tmp_path / "a.tar", [(f"a.{extension}", video(3)), (f"b.{extension}", b"?")])))
    assert (rows["a"]["num_frames"], rows["a"]["problem"]) == (3, None)
    assert (
        rows["b"]["problem"] == f"undecodable video: b.{extension}: it is no MP4, MOV, WebM, Matroska, AVI or MPEG-TS"
    )


def test_bad_videos_are_named_and_counted(tmp_path):
    members = [("good.mp4", video()), ("cut.mp4", video()[:-1]), ("sound.mp4", sound()), ("empty.webm", b"")]
    catalog = catalog_of(write_tar(tmp_path / "a.tar", members))
    problems = {key: row["problem"] for key, row in rows_of(catalog).items()}
    assert problems["good"] is None
    assert problems["cut"].startswith("undecodable video: cut.mp4: it is cut short")
    assert problems["sound"] == "undecodable video: sound.mp4: it has no video stream"
    assert problems["empty"] == "undecodable video: empty.webm: empty file"
    told = str(plan_of(catalog).survey)
    assert "1 of 4 rows can be drawn; 3 rejected: undecodable video (such as cut.mp4: it is cut short" in told
    assert read_summary(catalog.shard(0)).problems == 3


def test_video2dataset_tars_work_as_they_are(tmp_path):
    about = {"key": "000000000", "caption": "a cat", "status": "success", "error_message": None, "clips": [[0, 2.0]],
             "video_metadata": {"streams": []}}  # fmt: skip
    members = [("000000000.mp4", video()), ("000000000.txt", b"a cat"), ("000000000.json", json.dumps(about).encode()),
               ("000000001.mp4.json", b"{}")]  # fmt: skip
    catalog = catalog_of(write_tar(tmp_path / "00000.tar", members))
    (sample,) = plan_of(catalog, captions=CaptionGetter.parse(["txt", "identity"])).some_samples(10)
    assert (sample.key, sample.num_frames) == ("000000000", 10)


def test_dots_hide_no_video_in_silence(tmp_path):
    rows = rows_of(catalog_of(write_tar(tmp_path / "a.tar", [("a.mp4", video()), ("b.one.mp4", video())])))
    assert rows["b"]["problem"].startswith("dots in the name of a picture")


def test_two_videos_and_two_captions_of_a_key_are_refused(tmp_path):
    members = [("a.mp4", video()), ("a.txt", b"1"), ("a.webm", video()), ("a.txt", b"2"), ("b.jpg", picture())]
    rows = rows_of(catalog_of(write_tar(tmp_path / "a.tar", members)))
    assert rows["a"]["problem"].startswith("two samples share a key: a.mp4 and a.webm")


def test_facts_of_a_cached_clip_count_as_its_header(tmp_path):
    facts = {"width": 64, "height": 48, "num_frames": 17, "fps": 8.0, "crops": [[0, 0]]}
    members = [("a.picture.json", json.dumps(facts).encode()), ("b.picture.json", b'{"width": 8, "height": 8}')]
    samples = plan_of(catalog_of(write_tar(tmp_path / "a.tar", members))).some_samples(10)
    assert [(one.num_frames, one.fps) for one in samples] == [(17, 8.0), (1, 0.0)]


@pytest.mark.integration
def test_a_script_of_pictures_refuses_a_data_set_of_videos(tmp_path):
    videos = write_tar(tmp_path / "a.tar", [("a.mp4", video()), ("a.txt", b"a")])
    with pytest.raises(UserError, match=r"a\.tar holds videos, but this script trains on pictures.*--frames-every"):
        train_here(tiny_settings(tmp_path, videos))


def as_an_earlier_version_wrote_it(tar) -> Summary:
    """Take what is said of videos out of the index beside a tar; its summary then."""
    path = tar.with_name(tar.name + INDEX_SUFFIX)
    table = pq.read_table(path)
    saved = json.loads(table.schema.metadata[b"warpcore.index"])
    table = table.drop_columns([name for name in VIDEO_COLUMNS if name in table.column_names])
    saved["summary"]["fields"] = [name[5:] for name in table.column_names if name.startswith("json.")]
    pq.write_table(table.replace_schema_metadata({b"warpcore.index": json.dumps(saved).encode()}), path)
    return Summary(**{name: tuple(one) if isinstance(one, list) else one for name, one in saved["summary"].items()})


@pytest.mark.parametrize("with_manifest", [False, True])
def test_an_earlier_index_counts_for_pictures_and_not_for_videos(tmp_path, caplog, with_manifest):
    tars = [write_shard(tmp_path / "pictures.tar", 3), mixed(tmp_path / "videos.tar")]
    shards = list(catalog_of(*tars).shards())
    summaries = {str(tar): as_an_earlier_version_wrote_it(tar) for tar in tars}
    if with_manifest:
        write_manifests(shards, summaries)
    before = [tar.with_name(tar.name + INDEX_SUFFIX).read_bytes() for tar in tars]
    caplog.clear()
    catalog = catalog_of(*tars)
    after = [tar.with_name(tar.name + INDEX_SUFFIX).read_bytes() for tar in tars]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    assert "1 of 1 tars have an index of an earlier version" in caplog.text
    assert "changed" not in caplog.text
    assert rows_of(catalog)["b"]["num_frames"] == 10
