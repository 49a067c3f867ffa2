"""The cache gives the bytes of the very version, keeps to its size, and keeps what the plan needs first."""

import errno
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from warpcore.data import disk_cache
from warpcore.data.disk_cache import DiskCache
from warpcore.errors import UserError

MEMBER_BYTES, NUM_MEMBERS = 10_000, 20
MEMBERS = [(512 + number * 11_000, MEMBER_BYTES) for number in range(NUM_MEMBERS)]
TAR_BYTES = 512 + NUM_MEMBERS * 11_000


class Remote:
    """Tars far away; counts the ranges that are asked for."""

    def __init__(self):
        self.num_ranges = 0

    def read(self, url, ranges, version=None):
        self.num_ranges += len(ranges)
        content = random.Random(f"{url} {version}").randbytes(TAR_BYTES)
        return [content[offset : offset + size] for offset, size in ranges]


@pytest.fixture
def remote(monkeypatch):
    found = Remote()
    monkeypatch.setattr(disk_cache, "read_ranges", found.read)
    return found


def tar(number, etag="v1"):
    return f"s3://bucket/{number}.tar", (TAR_BYTES, etag)


def make_cache(folder, limit_bytes=10**9, needed=range(3)):
    return DiskCache(folder, limit_bytes, [tar(number) for number in needed])


def fetched(cache, remote, tar, ranges=MEMBERS):
    """How many of the ranges were not in the cache; all have to be right."""
    url, version = tar
    before = remote.num_ranges
    found, asked = cache(url, ranges, version), remote.num_ranges - before
    assert found == Remote().read(url, ranges, version)
    return asked


def used_bytes(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_only_what_is_missing_is_read_also_by_the_next_run(tmp_path, remote):
    cache = make_cache(tmp_path)
    assert fetched(cache, remote, tar(0), MEMBERS[::2]) == 10
    assert fetched(cache, remote, tar(0)) == 10
    assert fetched(cache, remote, tar(0)) == 0
    assert fetched(cache, remote, tar(0), [(0, 100), (512, 0), *MEMBERS]) == 2, "other ranges are other ranges"
    assert fetched(make_cache(tmp_path), remote, tar(0), MEMBERS[::-1]) == 0
    assert fetched(cache, remote, tar(0, "v2")) == 20, "another version shares nothing"


def test_local_tars_are_not_copied(tmp_path, remote):
    cache = make_cache(tmp_path / "cache")
    for _ in range(2):
        assert fetched(cache, remote, ("/data/x.tar", (TAR_BYTES, "v1"))) == 20


def test_a_cache_for_a_part_of_the_data_saves_that_part_of_the_requests(tmp_path, remote, monkeypatch):
    draws = [(number, member) for number in range(5) for member in MEMBERS]
    limit = 5 * TAR_BYTES // 2
    cache, shuffle = make_cache(tmp_path, limit, needed=range(5)), random.Random(0).shuffle
    monkeypatch.setattr(disk_cache, "FULL_SECONDS", 0)
    for epoch in range(4):
        shuffle(draws)
        misses = sum(fetched(cache, remote, tar(number), [member]) for number, member in draws)
        assert used_bytes(tmp_path) <= limit
        assert misses == 100 if epoch == 0 else 55 <= misses <= 65, "of 100; blocks of the disk take some room too"


def test_what_the_plan_does_not_need_makes_room_least_recently_used_first(tmp_path, remote):
    old, lists = make_cache(tmp_path), set()
    for number in (7, 8, 9):
        fetched(old, remote, tar(number))
        (new,) = set(tmp_path.glob("*.list")) - lists
        lists.add(new)
        os.utime(new, (0, number))
    assert fetched(old, remote, tar(7)) == 0  # used again
    room_for_three = used_bytes(tmp_path) + 60_000  # more is reserved than is then used
    cache = make_cache(tmp_path, room_for_three, needed=[0, 1, 2, 8])
    assert fetched(cache, remote, tar(0)) == 20
    assert [fetched(cache, remote, tar(number)) for number in (0, 7, 8)] == [0, 0, 0], "9 was used before 7"
    assert fetched(cache, remote, tar(1)) == 20
    assert fetched(cache, remote, tar(2)) == 20
    assert [fetched(cache, remote, tar(number)) for number in (0, 1, 8)] == [0, 0, 0], "what the plan needs stays"
    assert fetched(cache, remote, tar(2)) == 20


def test_a_smaller_limit_is_kept_too(tmp_path, remote):
    cache = make_cache(tmp_path)
    for number in range(3):
        fetched(cache, remote, tar(number))
    cache = make_cache(tmp_path, TAR_BYTES * 2)
    assert fetched(cache, remote, tar(0), [(0, 10)]) == 1
    assert used_bytes(tmp_path) <= TAR_BYTES * 2


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[MEMBERS[3][0] + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "damage", "lost"),
    [
        (".data", flip, 1),
        (".data", lambda path: path.write_bytes(path.read_bytes()[: TAR_BYTES // 2]), 10),
        (".data", lambda path: path.unlink(), 20),
        (".list", lambda path: path.write_bytes(path.read_bytes()[:-5]), 1),
        (".list", lambda path: path.write_bytes(b""), 20),
    ],
    ids=["a bit", "half of the data", "all data", "the end of the list", "the list"],
)
def test_what_is_damaged_is_read_anew(tmp_path, remote, suffix, damage, lost):
    cache = make_cache(tmp_path)
    fetched(cache, remote, tar(0))
    (path,) = tmp_path.glob(f"*{suffix}")
    damage(path)
    assert fetched(cache, remote, tar(0)) == lost
    fetched(cache, remote, tar(0))  # a list that was cut off starts anew
    assert fetched(cache, remote, tar(0)) == 0


def test_a_full_disk_is_told_and_stops_nothing(tmp_path, remote, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = make_cache(tmp_path)
    monkeypatch.setattr(DiskCache, "_write", full)
    assert [fetched(cache, remote, tar(0)) for _ in range(2)] == [20, 20]
    assert caplog.text.count("the disk is full before the cache is") == 1


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cache_path: nothing can be written to \S+file/cache"):
        make_cache(tmp_path / "file" / "cache")


def read_at_random(cache, seed, failures):
    disk_cache.read_ranges, draw = Remote().read, random.Random(seed)
    for _ in range(150):
        url, version = tar(draw.randrange(3))
        ranges = draw.sample(MEMBERS, 3)
        if cache(url, ranges, version) != Remote().read(url, ranges, version):
            failures.put(url)


@pytest.mark.integration
def test_processes_share_a_cache(tmp_path, remote):
    limit = 2 * TAR_BYTES
    cache, context = make_cache(tmp_path, limit), multiprocessing.get_context("spawn")
    failures = context.Queue()
    processes = [context.Process(target=read_at_random, args=(cache, seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert failures.empty()
    assert used_bytes(tmp_path) <= limit + 3 * 4096  # each process may be a block ahead of the count
    assert sum(fetched(cache, remote, tar(number)) for number in range(3)) < 40
