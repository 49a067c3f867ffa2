"""What a plan makes of uneven, large, changed and unusable data."""

import json
import os
import tarfile
from collections import Counter
from itertools import islice

import pytest

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from warpcore.data import catalog as catalog_module
from warpcore.data import plan as plan_module
from warpcore.data.buckets import Buckets
from warpcore.data.plan import Plan, default_lanes, describe_difference
from warpcore.data.reader import Reader
from warpcore.data.storage_protocol import ChangedShardError
from warpcore.errors import UserError

SQUARE = Buckets(16 * 16, 4)


def plan_of(catalog, **arguments) -> Plan:
    return Plan(catalog, **{"micro_batch_size": 1, "buckets": SQUARE, **arguments})


def take(plan: Plan, count: int) -> list:
    return list(islice(plan.micro_batches(), count))


def test_one_large_tar_serves_several_lanes(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "ROWS_PER_LANE", 8)
    plan = plan_of(catalog_of(write_shard(tmp_path / "x.tar", 20)))
    assert plan.num_lanes == 2
    drawn = Counter(sample.key for micro_batch in take(plan, 40) for sample in micro_batch.samples)
    assert set(drawn.values()) == {2}
    assert len(drawn) == 20


@pytest.mark.parametrize("weight", [1, 3])
def test_lanes_get_equal_loads_of_uneven_tars(tmp_path, weight):
    paths = [write_shard(tmp_path / f"{n}.tar", 8, first=8 * n) for n in range(5)]
    catalog = catalog_of({"path": str(paths[0]), "weight": weight}, *paths[1:])
    plan = plan_of(catalog, num_lanes=4)
    firsts = [micro_batch for micro_batch in take(plan, 400) if micro_batch.epoch == 0]
    loads = Counter(micro_batch.lane for micro_batch in firsts).values()
    assert sum(loads) == 32 + 8 * weight
    assert max(loads) - min(loads) <= weight


def test_a_tar_that_was_replaced_stops_the_run(tmp_path):
    path = write_shard(tmp_path / "x.tar", 3)
    (micro_batch,) = take(plan_of(catalog_of(path), micro_batch_size=3), 1)
    assert Reader().__getitems__(micro_batch).weight == 1
    content = path.read_bytes()
    path.write_bytes(content)  # the same size, at another time
    os.utime(path, (1, 1))
    with pytest.raises(ChangedShardError, match=r"x\.tar changed while it was in use.*on_data_change"):
        Reader().__getitems__(micro_batch)


def test_a_required_member_may_have_several_names(tmp_path):
    members = [(f"{n}.jpg", picture()) for n in range(3)] + [("0.mask.png", b""), ("1.mask.jpg", b"")]
    catalog = catalog_of(write_tar(tmp_path / "x.tar", members))
    plan = plan_of(catalog, required_members=[("mask.png", "mask.jpg")])
    assert sorted(sample.key for m in take(plan, 2) for sample in m.samples) == ["0", "1"]
    assert "1 rejected: no .mask.png or .mask.jpg" in str(plan.survey)
    with pytest.raises(UserError, match=r"no sample has a \.depth\.png or \.depth\.\s?.*jpg, mask\.jpg, mask\.png"):
        plan_of(catalog, required_members=[("depth.png", "depth.")])


def test_a_caption_that_has_the_name_of_the_picture_with_its_extension_is_named(tmp_path):
    members = [(f"{n}.jpg", picture()) for n in range(3)] + [("0.txt", b"a"), ("1.jpg.txt", b"a")]
    plan = plan_of(catalog_of(write_tar(tmp_path / "x.tar", members)), required_members=[("txt",)])
    survey = str(plan.survey)
    assert "2 rejected: no .txt (such as 1, which has a .jpg.txt instead, in" in survey
    assert "rename it to .txt, or make tars of the folder with tools/build_dataset.py" in survey


def test_a_picture_over_the_limit_is_rejected_and_counted(tmp_path):
    catalog = catalog_of(write_shard(tmp_path / "x.tar", 4, sizes=((16, 12), (100, 100))))
    plan = plan_of(catalog, max_picture_pixels=9_999)
    assert "2 rejected: more than 9999 pixels (max_picture_pixels)" in str(plan.survey)
    assert {sample.width for m in take(plan, 4) for sample in m.samples} == {16}


def test_a_weight_that_leaves_no_row_is_an_error(tmp_path):
    path = write_shard(tmp_path / "x.tar", 4)
    with pytest.raises(UserError, match=r"weight 0.1 of .*x.tar leaves not one of its 4 rows.*at least 0.25"):
        catalog_of({"path": str(path), "weight": 0.1}, write_shard(tmp_path / "y.tar", 2))


def test_validation_tars_are_known_by_their_files(tmp_path):
    write_shard(tmp_path / "a.tar", 2)
    write_shard(tmp_path / "b.tar", 3, first=10)
    (tmp_path / "held").mkdir()
    (tmp_path / "held/link.tar").symlink_to(tmp_path / "b.tar")
    training = catalog_of(tmp_path / "a.tar", tmp_path / "b.tar")
    assert plan_of(training, validation=catalog_of(tmp_path / "held")).num_rows == 2


def test_the_fingerprint_of_many_shards_is_short_and_still_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "MAX_LISTED_SHARDS", 2)
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", 2)
    saved = json.loads(json.dumps(plan_of(catalog_of(tmp_path)).fingerprint))
    assert "0.tar" not in json.dumps(saved)
    assert describe_difference(saved, plan_of(catalog_of(tmp_path)).fingerprint) is None
    write_shard(tmp_path / "0.tar", 5)
    told = describe_difference(saved, plan_of(catalog_of(tmp_path)).fingerprint)
    assert told.startswith("shards changed: 3 shards with 6 rows -> 3 shards with 9 rows")


def test_a_linked_folder_in_a_tar_is_named(tmp_path, caplog):
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "linked").symlink_to(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "linked"):
            tar.add(tmp_path / name, f"pictures/{name}")
    catalog_of(tmp_path / "x.tar")
    assert "x.tar: what links lead to is not in the tar (1: pictures/linked); build it with tar --deref" in caplog.text


def test_a_tar_with_links_says_so(tmp_path):
    for name, content in (("a.jpg", picture()), ("b.jpg", None), ("c.jpg", None)):
        path = tmp_path / name
        path.write_bytes(content) if content else path.hardlink_to(tmp_path / "a.jpg")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in "abc":
            tar.add(tmp_path / f"{name}.jpg", f"{name}.jpg")
    plan = plan_of(catalog_of(tmp_path / "x.tar"))
    assert str(plan.survey).startswith("1 of 3 rows can be drawn; 2 rejected: no picture")
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "z/notes")
        for name in "bc":
            tar.add(tmp_path / f"{name}.jpg", f"{name}.jpg")
    with pytest.raises(UserError, match=r"holds no picture.*--hard-dereference"):
        catalog_of(tmp_path / "y.tar")


def test_the_number_of_lanes_follows_from_the_rows():
    assert [default_lanes(rows) for rows in (0, 1, 131_071, 131_072, 10**6, 10**9)] == [1, 1, 1, 2, 8, 64]
