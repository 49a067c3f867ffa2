import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from warpcore.data import identity
from warpcore.data.buckets import Buckets
from warpcore.data.catalog import Catalog
from warpcore.data.index import INDEX_SUFFIX, index_shard
from warpcore.data.plan import Plan
from warpcore.data.shards import resolve_sources
from warpcore.data.sidecars import cache_locations


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan_of(catalog: Catalog, **settings) -> Plan:
    return Plan(catalog, micro_batch_size=1, buckets=Buckets.for_image_size(64, [], 32), **settings)


def saved(plan: Plan) -> dict:
    return json.loads(json.dumps(plan.fingerprint))


def test_copied_and_touched_data_are_the_same_data_and_are_looked_at_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "one").mkdir()
    for number in range(2):
        write_shard(tmp_path / "one" / f"{number}.tar", 3)
    before = saved(plan_of(catalog_of(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    index = tmp_path / "two" / f"0.tar{INDEX_SUFFIX}"
    content = index.read_bytes()
    assert plan_of(catalog_of(tmp_path / "two")).difference(before) is None
    os.utime(tmp_path / "two" / "0.tar", (1, 1))
    assert plan_of(catalog_of(tmp_path / "two")).difference(before) is None
    assert index.read_bytes() == content, "the index that came with the data stays"
    assert not caplog.records
    identity._of_files.clear()  # as another process begins
    monkeypatch.setattr("warpcore.data.catalog.index_shard", lambda shard: pytest.fail("a tar was read again"))
    assert plan_of(catalog_of(tmp_path / "two")).difference(before) is None


def test_several_threads_know_what_was_looked_at(tmp_path, monkeypatch):
    """One that asks while another one reads the file finds it read."""
    shards = [catalog_of(write_shard(tmp_path / f"{number}.tar", 1, number)).shard(0) for number in range(2)]
    for shard in shards:
        identity.remember(shard, shard.content)
    identity._of_files.clear()
    found = []
    read_bytes = identity.read_bytes

    def read_slowly(location):
        monkeypatch.setattr(identity, "read_bytes", read_bytes)
        with ThreadPoolExecutor(1) as other:
            found.append(other.submit(identity.remembered, shards[1]).result(timeout=60))
        return read_bytes(location)

    monkeypatch.setattr(identity, "read_bytes", read_slowly)
    found.append(identity.remembered(shards[0]))
    assert found == [shards[1].content, shards[0].content]


def test_a_caption_of_equal_length_that_changed_is_noticed(tmp_path, caplog):
    path = tmp_path / "x.tar"
    write_tar(path, [("0.jpg", picture()), ("0.txt", b"a cat")])
    before = saved(plan_of(catalog_of(path)))
    write_tar(path, [("0.jpg", picture()), ("0.txt", b"a dog")])
    os.utime(path, (1, 1))
    assert plan_of(catalog_of(path)).difference(before).startswith("shard x.tar changed")
    assert "x.tar changed since it was indexed" in caplog.text


def test_a_fingerprint_with_times_of_change_is_compared_with_the_present_times(tmp_path):
    path = write_shard(tmp_path / "x.tar", 3)
    plan = plan_of(catalog_of(path))
    status = path.stat()
    old = saved(plan) | {"shards": catalog_of(path).fingerprint(by_time=True)}
    assert old["shards"]["table"] == {"x.tar": f"{status.st_size} bytes, mtime-{status.st_mtime_ns}"}
    assert plan.difference(old) is None
    os.utime(path, (1, 1))
    assert "mtime-" in plan_of(catalog_of(path)).difference(old)


def test_a_run_that_began_with_other_pairs_of_members_is_told(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", picture()), ("0.txt", b"old"), ("0.txt", b"new")])
    status = path.stat()
    plan = plan_of(catalog_of(path))
    table = {"x.tar": f"{status.st_size} bytes, mtime-{status.st_mtime_ns}"}
    old = saved(plan) | {"shards": {"digest": "", "shards": 1, "rows": 2, "table": table}}
    assert "its members paired by name now" in plan.difference(old)


def test_each_machine_checks_its_own_copy_by_content(tmp_path):
    path = write_shard(tmp_path / "x.tar", 3)
    of_main_process = catalog_of(path)
    os.utime(path, (1, 1))
    here = of_main_process.on_this_machine()
    assert here.shard(0).etag == "mtime-1000000000"
    assert here.fingerprint() == of_main_process.fingerprint()
    write_shard(path, 3, first=5)
    with pytest.raises(Exception, match="holds other data than on the machine of the main process"):
        of_main_process.on_this_machine()


@pytest.mark.parametrize("how", ["link", "copy"])
def test_a_tar_with_two_names_is_read_once_and_never_trained_on_when_held_out(tmp_path, caplog, how):
    for folder in ("v2", "other"):
        (tmp_path / folder).mkdir()
    write_shard(tmp_path / "v2" / "0.tar", 3)
    write_shard(tmp_path / "other" / "1.tar", 4, first=10)
    if how == "link":
        (tmp_path / "latest").symlink_to(tmp_path / "v2")
    else:
        shutil.copytree(tmp_path / "v2", tmp_path / "latest", copy_function=shutil.copyfile)
    catalog = catalog_of(tmp_path / "v2", tmp_path / "latest")
    assert catalog.urls == [str(tmp_path / "v2" / "0.tar")]
    assert "latest/0.tar is" in caplog.text
    plan = plan_of(catalog_of(tmp_path / "v2", tmp_path / "other"), validation=catalog_of(tmp_path / "latest"))
    assert plan.num_rows == 4


def test_names_that_are_not_utf_8_count_in_the_hash(tmp_path):
    contents = []
    for name in (b"caf\xe9", b"caf\xe8"):
        key = os.fsdecode(name)
        tar = write_tar(tmp_path / f"{name[-1]}.tar", [(f"{key}.jpg", picture()), (f"{key}.txt", b"coffee")])
        contents.append(index_shard(resolve_sources(str(tar))[0].shards[0]).content)
    assert contents[0] != contents[1]


@pytest.mark.parametrize(
    "damaged", [b"5\n", b"[[], 1, 2, 3]\n", b"\xff\xfe\n", b"[" * 50_000 + b"\n", None], ids=lambda each: str(each)[:9]
)
def test_a_damaged_note_of_what_was_looked_at_costs_a_look_and_no_more(tmp_path, damaged):
    path = write_shard(tmp_path / "x.tar", 3)
    shard = catalog_of(path).shard(0)
    place = Path(cache_locations(f"{tmp_path}/", identity.LOOKED_NAME)[0])
    if damaged is None:
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(parents=True)
        place.write_bytes(damaged)
    identity._of_files.clear()
    assert identity.remembered(shard) is None
    if damaged is not None:
        identity.remember(shard, "content")
        identity._of_files.clear()
        assert identity.remembered(shard) == "content"


def test_tars_that_differ_only_behind_the_start_of_their_pictures_are_two(tmp_path, caplog):
    """Uncompressed pictures store their rows from the bottom: here those are white in both."""
    for name, top in (("a", 0), ("b", 200)):
        pixels = np.full((128, 128, 3), 255, np.uint8)
        pixels[:32] = top
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "BMP")
        write_tar(tmp_path / f"{name}.tar", [("0.bmp", content.getvalue()), ("0.txt", b"a scan")])
    shutil.copy(tmp_path / "b.tar", tmp_path / "c.tar")
    catalog = catalog_of(tmp_path)
    assert len(set(catalog.contents)) == 1, "this test wants tars with equal hashes"
    assert [url.rpartition("/")[2] for url in catalog.urls] == ["a.tar", "b.tar"]
    assert "c.tar is" in caplog.text
