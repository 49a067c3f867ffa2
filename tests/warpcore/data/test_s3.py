"""A bucket means what a folder means, and its bytes are right or an error that says why not."""

import multiprocessing
import re
import tarfile
from itertools import count

import pytest

from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from tests.warpcore.data.tars import catalog_of, picture, write_shard, write_tar
from warpcore.data import s3, s3_requests
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import INDEX_SUFFIX, index_shard, read_rows
from warpcore.data.shards import resolve_sources
from warpcore.data.storage import read_ranges, storage_for
from warpcore.data.storage_protocol import ChangedShardError, StorageError
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(s3_requests, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(s3_requests, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(s3_requests, "CALL_ATTEMPTS", 2)
    monkeypatch.setattr(s3_requests, "CALL_SECONDS", 0.3)


def state_of(url):
    return storage_for(url).stat(url)


# Paths


def test_compressed_tars_of_a_prefix_are_counted_and_named(bucket, caplog):
    for key in ("set/1.tar", "set/2.tar.gz", "only/1.tgz"):
        bucket.put(key, b"x")
    root = f"s3://{bucket.name}"
    assert [shard.url for shard in resolve_sources(f"{root}/set")[0].shards] == [f"{root}/set/1.tar"]
    assert f"1 compressed ({root}/set/2.tar.gz)" in caplog.text
    with pytest.raises(UserError, match=r"holds no \.tar but 1 compressed \(.*only/1\.tgz\).*decompress"):
        resolve_sources(f"{root}/only")


PATHS = ["", "more", "more/", "00001.tar", "*.tar", "**/*.tar", "{00000..00002}.tar", "[!0]*.tar", "?0001.tar"]
PATHS += ["*/*.tar", "{00000,more/00003}.tar", "sets.yml", "é +%#?.tar"]


def test_a_path_means_in_a_bucket_what_it_means_in_a_folder(bucket, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "more/deep").mkdir(parents=True)
    for name in ["00000", "00001", "00002", "more/00003", "more/deep/1", "é +%#?", ".hidden", "more/.x/2", "10"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.tar").write_bytes(name.encode())
    (folder / "sets.yml").write_text("- 00000.tar\n- {path: more, weight: 2}\n")
    bucket.upload(folder, "set/")
    bucket.put("settle/1.tar", b"of another prefix")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")  # a page of a listing
    monkeypatch.setattr(s3, "MOST_HEADS", 1)

    def found(root, path):
        return [
            (source.weight, [(shard.url.removeprefix(root), shard.size_bytes) for shard in source.shards])
            for source in resolve_sources(f"{root}/{path}")
        ]

    for path in PATHS:
        assert found(f"{bucket.url}/set", path) == found(str(folder), path), path


NOWHERE = {
    "BUCKET/set/0000.tar": r"no such tar: \S+/set/0000.tar .*Near it: \S+/set/00000.tar",
    "BUCKET/sett/00000.tar": "Near it: .*/set/",
    "BUCKET/set/{00000..00003}.tar": "no such tar: .*00001.tar, .*3.tar .from",
    "BUCKET/set/*9.tar": "matches nothing",
    "BUCKET/nothing/": "no such tar",
    "BUCKET/set/x/": "no such tar",
    "BUCKETx/set/": "there is no such bucket at http://127.*Near it: bucket-",
    "BUCKET/set/a.tar.gz": "compressed",
    "s3:/bucket/x.tar": "looks like s3://bucket/folder",
}


def test_a_path_that_leads_nowhere_is_explained(bucket):
    bucket.put("set/00000.tar", b"x")
    for path, message in NOWHERE.items():
        with pytest.raises(UserError, match=message):
            resolve_sources(path.replace("BUCKET", bucket.url))


def test_missing_and_refused_credentials_and_an_endpoint_that_is_not_there_are_explained(
    bucket, monkeypatch, impatient
):
    url = bucket.put("x.tar", b"x")
    with FaultyProxy(bucket.endpoint, refused=("GET", "HEAD")) as proxy:
        talk_to(proxy.url, monkeypatch)
        with pytest.raises(StorageError, match=r"x.tar: .*AccessDenied.*AWS_PROFILE"):
            resolve_sources(url)
        with pytest.raises(StorageError, match=r"x.tar can't be read: .*403 Forbidden: AccessDenied"):
            read_ranges(url, [(0, 1)])
    talk_to(proxy.url, monkeypatch)
    with pytest.raises(StorageError, match=f"Could not connect to the endpoint URL: .*{proxy.url}"):
        resolve_sources(url)
    talk_to(bucket.endpoint, monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"there are no credentials\. Set AWS_PROFILE"):
        resolve_sources(url)
    bucket.client.put_object_acl(Bucket=bucket.name, Key="x.tar", ACL="public-read")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert len(resolve_sources(url)) == 1
    assert read_ranges(url, [(0, 1)]) == [b"x"]


# Bytes


def test_near_ranges_are_read_together_and_long_ones_in_parts(bucket, monkeypatch):
    content = bytes(range(256)) * 4000
    url = bucket.put("x.tar", content)
    monkeypatch.setattr(s3_requests, "REQUEST_BYTES", 300_000)
    ranges = [(1_000_000, 100), (5, 0), (0, 10), (60_000, 10), (200_000, 700_000), (300_000, 7)]
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        version = state_of(url)
        assert read_ranges(url, ranges, version) == [content[offset:][:size] for offset, size in ranges]
        assert proxy.gets.total() == 1 + 3 + 1
        with pytest.raises(ChangedShardError):
            read_ranges(url, [(len(content) - 5, 6)])


@pytest.mark.parametrize(("faults", "part_status"), [((fault,), 206) for fault in FAULTS] + [(FAULTS, 200)])
def test_passing_faults_change_nothing(bucket, monkeypatch, impatient, faults, part_status):
    content = b"".join(number.to_bytes(4, "big") for number in range(50_000))
    url = bucket.put("x.tar", content)
    monkeypatch.setattr(s3_requests, "PATIENCE_SECONDS", 30)
    with FaultyProxy(bucket.endpoint, share=0.2, faults=faults, part_status=part_status) as proxy:
        talk_to(proxy.url, monkeypatch)
        version = state_of(url)
        for first in range(0, 50_000, 5_000):
            ranges = [(first, 2_000), (first + 90_000, 3_000)]
            assert read_ranges(url, ranges, version) == [content[offset:][:size] for offset, size in ranges]
    assert set(proxy.met) == set(faults)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_is_an_error_that_says_what_it_is(bucket, monkeypatch, impatient, fault):
    url = bucket.put("x.tar", bytes(1000))
    with FaultyProxy(bucket.endpoint, faults=(fault,)) as proxy:
        talk_to(proxy.url, monkeypatch)
        version, proxy.share = state_of(url), 1.0
        message = {"503": "503", "wrong length": "asked for 1000 bytes, got 500"}.get(fault, "body")
        with pytest.raises(StorageError, match=rf"x.tar can't be read, tried for 1 seconds: .*{message}"):
            read_ranges(url, [(0, 1000)], version)


@pytest.mark.parametrize(
    "endpoint", [{}, {"ignored": ("if-match",)}, {"ignored": ("if-match",), "part_status": 200}], ids=str
)
def test_another_version_is_never_read(bucket, monkeypatch, impatient, endpoint):
    first, second = b"a" * 1000, b"b" * 1000
    url = bucket.put("x.tar", first)
    version = state_of(url)
    with FaultyProxy(bucket.endpoint, faults=("reset",), **endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        assert read_ranges(url, [(0, 1000)], version) == [first]
        for content in (second, first[:900], first + b"a"):
            bucket.put("x.tar", content)
            with pytest.raises(ChangedShardError, match=r"x\.tar changed"):
                read_ranges(url, [(0, 10), (890, 10)], version)

        bucket.put("x.tar", first)
        proxy.share, proxy.on_fault = 1.0, lambda: (bucket.put("x.tar", second), setattr(proxy, "share", 0.0))
        with pytest.raises(ChangedShardError):  # it is replaced when half of it is read
            read_ranges(url, [(0, 1000)], version)
        bucket.client.delete_object(Bucket=bucket.name, Key="x.tar")
        with pytest.raises(ChangedShardError):
            read_ranges(url, [(0, 1000)], version)


def read_in_child(url, answers):
    try:
        answers.put(read_ranges(url, [(0, 1)]))
    except RuntimeError as error:
        answers.put(str(error))


@pytest.mark.integration
def test_a_forked_process_says_that_it_can_not_read_instead_of_hanging(bucket):
    url = bucket.put("x.tar", b"x")
    read_ranges(url, [(0, 1)])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=read_in_child, args=(url, answers))
    child.start()
    assert "start it with spawn" in answers.get(timeout=10)
    child.join()


# Indexes


def test_indexes_lie_beside_the_tars_and_the_next_start_reads_the_manifest_alone(bucket, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for number in range(9):
        write_shard(tmp_path / f"data/{number}.tar", 2, first=2 * number)
    url = bucket.upload(tmp_path / "data")
    remote, local = catalog_of(url), catalog_of(tmp_path / "data")
    for number in range(9):
        assert remote.name(number) == local.name(number)
        assert read_rows(remote.shard(number)).equals(read_rows(local.shard(number)))
    assert {f"{n}.tar{INDEX_SUFFIX}" for n in range(9)} | {MANIFEST_NAME} < set(bucket.list_keys())
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        assert catalog_of(url).fingerprint() == remote.fingerprint()
        assert [path.rpartition("/")[2] for path in proxy.gets if proxy.gets[path]] == [bucket.name, MANIFEST_NAME]


@pytest.mark.parametrize("cache", ["home", "folder", "prefix"])
def test_indexes_of_a_bucket_that_can_not_be_written_go_to_a_cache(bucket, tmp_path, monkeypatch, cache):
    url = bucket.upload(write_shard(tmp_path / "x.tar", 3).parent, "set/")
    place = {"home": tmp_path / "home/warpcore/index", "folder": tmp_path / "place", "prefix": f"{bucket.url}/place"}
    with FaultyProxy(bucket.endpoint, refused=("PUT",) if cache == "home" else ()) as proxy:
        talk_to(proxy.url, monkeypatch)
        if cache != "home":
            monkeypatch.setenv("WARPCORE_INDEX_CACHE", str(place[cache]))
        assert catalog_of(url).num_rows == 3
        before = proxy.gets[f"/{bucket.name}/set/x.tar"]
        assert len(read_rows(catalog_of(url).shard(0))) == 3
        assert proxy.gets[f"/{bucket.name}/set/x.tar"] == before > 0, "the index was found"
    assert not any(key.startswith("set/") and key.endswith(INDEX_SUFFIX) for key in bucket.list_keys())
    held = bucket.list_keys() if cache == "prefix" else [str(path) for path in place[cache].iterdir()]
    assert any(re.search(rf"/\w{{16}}-x\.tar{INDEX_SUFFIX}$", name) for name in held)


def test_a_large_tar_is_walked_without_reading_its_large_members(bucket, tmp_path, monkeypatch):
    members = [(f"{number}.{kind}", content) for number in range(40) for kind, content in
               (("jpg", picture(8 + number, 9)), ("json", b'{"n": %d}' % number), ("npy", bytes(80_000)))]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    url = bucket.upload(tmp_path)
    monkeypatch.setattr(s3, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(s3, "LEAST_AHEAD_BYTES", 4096)
    lengths, whole = [], s3_requests.get

    def get(url, start, stop, version=None):
        lengths.append(stop - start)
        return whole(url, start, stop, version)

    monkeypatch.setattr(s3_requests, "get", get)
    catalog, local = catalog_of(f"{url}x.tar"), catalog_of(tmp_path / "x.tar")
    assert read_rows(catalog.shard(0)).equals(read_rows(local.shard(0)))
    assert sum(lengths) < (tmp_path / "x.tar").stat().st_size / 2


def test_small_members_are_read_through_in_growing_blocks(bucket, tmp_path, monkeypatch):
    write_shard(tmp_path / "x.tar", 300)
    url = bucket.upload(tmp_path) + "x.tar"
    size = (tmp_path / "x.tar").stat().st_size
    monkeypatch.setattr(s3, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(s3, "LEAST_AHEAD_BYTES", 8192)
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        assert index_shard(resolve_sources(url)[0].shards[0]).rows == 300
        assert proxy.gets[f"/{bucket.name}/x.tar"] < size / 8192 / 4
        with tarfile.open(fileobj=storage_for(url).open(url)) as tar:
            assert len(tar.getmembers()) == 901


def test_an_outage_is_no_damaged_index(bucket, tmp_path, monkeypatch, impatient):
    url = bucket.upload(write_shard(tmp_path / "x.tar", 2).parent)
    shard = catalog_of(url).shard(0)
    with FaultyProxy(bucket.endpoint, faults=("503",)) as proxy:
        talk_to(proxy.url, monkeypatch)
        state_of(shard.url)
        proxy.share = 1.0
        with pytest.raises(StorageError, match=rf"{INDEX_SUFFIX} can't be read, tried for 1 seconds"):
            read_rows(shard)
        with pytest.raises(StorageError):
            index_shard(shard)


def test_a_fault_while_indexing_is_no_bad_picture(bucket, tmp_path, monkeypatch):
    url = bucket.upload(write_shard(tmp_path / "x.tar", 100).parent) + "x.tar"
    shard = resolve_sources(url)[0].shards[0]
    monkeypatch.setattr(s3, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(s3, "LEAST_AHEAD_BYTES", 8192)
    monkeypatch.setattr(s3, "MOST_AHEAD_BYTES", 8192)
    whole, calls = s3_requests.get, count()

    def get(url, start, stop, version=None):
        if next(calls) == failing:
            raise StorageError("gone")
        return whole(url, start, stop, version)

    monkeypatch.setattr(s3_requests, "get", get)
    for failing in range(30):  # noqa: B007 (`get` reads it)
        calls = count()
        with pytest.raises(StorageError, match="gone"):
            index_shard(shard)
