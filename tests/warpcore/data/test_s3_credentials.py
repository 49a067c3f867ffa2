"""Credentials that are exchanged while in use, what S3 says when it refuses, and buckets whose readers pay."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faulty_proxy import FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from warpcore.data import s3_files
from warpcore.data.shards import resolve_sources
from warpcore.data.storage import read_ranges, storage_for
from warpcore.data.storage_protocol import StorageError

pytestmark = pytest.mark.integration

CONTENT = b"0123456789"
REFUSALS = [(400, "ExpiredToken"), (401, "Unauthorized"), (403, "InvalidAccessKeyId")] + [
    pytest.param(status, code, marks=pytest.mark.slow)
    for status, code in ((400, "TokenRefreshRequired"), (403, "SignatureDoesNotMatch"), (403, "AccessDenied"))
]


def _send(url: str) -> None:
    Path("sent").write_bytes(b"sent")
    s3_files.send(Path("sent"), f"{url}/sent")


USES = {
    "list": lambda url: resolve_sources(f"{url}/set/"),
    "head": lambda url: resolve_sources(f"{url}/set/x.tar"),
    "read": lambda url: read_ranges(f"{url}/set/x.tar", [(2, 3)]),
    "open": lambda url: storage_for(url).open(f"{url}/set/x.tar").read(),
    "write": lambda url: storage_for(url).write(f"{url}/set/index", b"index"),
    "send": _send,
    "put_if": lambda url: s3_files.put_if(f"{url}/lease", b"lease", None),
    "remove": lambda url: s3_files.remove([f"{url}/set/y"]),
}


@pytest.fixture
def rotate(tmp_path, monkeypatch):
    """Writes an access key into the file of credentials, which is all that there is."""
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.chdir(tmp_path)

    def write(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret of {key}\n")

    write("old")
    return write


@pytest.fixture
def proxy(request, bucket, rotate, monkeypatch):
    """What stands before the bucket and can refuse keys. Its parameter: the status of a part of an object."""
    bucket.put("set/x.tar", CONTENT)
    with FaultyProxy(bucket.endpoint, part_status=getattr(request, "param", 206)) as proxy:
        talk_to(proxy.url, monkeypatch)
        assert read_ranges(f"{bucket.url}/set/x.tar", [(0, 1)]) == [b"0"]
        yield proxy


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_credentials_in_a_rotated_file_are_read_again(bucket, proxy, rotate, status, code):
    proxy.refused_keys["old"] = status, code
    rotate("new")
    assert USES["read"](bucket.url) == [b"234"]


@pytest.mark.parametrize("name", USES)
def test_they_are_read_again_for_every_kind_of_request(bucket, proxy, rotate, name):
    proxy.refused_keys["old"] = 400, "ExpiredToken"
    rotate("new")
    assert USES[name](bucket.url) or name in ("write", "send", "remove")
    assert name != "send" or "sent" in bucket.list_keys()
    assert name != "write" or "set/index" in bucket.list_keys()


@pytest.mark.parametrize("proxy", [200], indirect=True)
def test_they_are_read_again_where_parts_of_objects_come_by_url(bucket, proxy, rotate):
    proxy.refused_keys["old"] = 400, "ExpiredToken"
    rotate("new")
    assert USES["read"](bucket.url) == [b"234"]
    proxy.refused_keys["new"] = 403, "InvalidAccessKeyId"
    with pytest.raises(StorageError, match=r"InvalidAccessKeyId: It is InvalidAccessKeyId\. Credentials were"):
        USES["read"](bucket.url)


def test_requests_that_are_refused_at_the_same_time_look_for_credentials_once(bucket, proxy, rotate, caplog):
    proxy.refused_keys["old"] = 400, "ExpiredToken"
    rotate("new")
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda place: read_ranges(f"{bucket.url}/set/x.tar", [(place, 1)])[0], range(10))
        assert b"".join(found) == CONTENT
    assert [record.getMessage() for record in caplog.records] == [
        f"{bucket.url}: refused, going on with the credentials that are there now"
    ]


@pytest.mark.parametrize("name", USES)
def test_what_is_refused_again_ends_at_once_with_the_code_and_what_to_do(bucket, proxy, rotate, name):
    proxy.refused_keys |= dict.fromkeys(("old", "new"), (400, "ExpiredToken"))
    rotate("new")
    before = proxy.num_requests
    with pytest.raises(StorageError) as error:
        USES[name](bucket.url)
    said = "It is ExpiredToken. Credentials were looked up again, and the present ones are refused. Set AWS_PROFILE"
    assert said in str(error.value)
    assert "ExpiredToken" in str(error.value).replace(said, "")
    assert proxy.num_requests - before <= 6  # boto3 asks after the region where a HEAD gets a 400


def test_where_no_others_are_found_nothing_is_asked_twice(bucket, proxy):
    proxy.refused_keys["old"] = 403, "InvalidAccessKeyId"
    before = proxy.num_requests
    with pytest.raises(StorageError, match="InvalidAccessKeyId"):
        USES["list"](bucket.url)
    assert proxy.num_requests - before == 1


@pytest.mark.parametrize("proxy", [206, 200], indirect=True)
def test_a_bucket_whose_readers_pay_is_read_where_they_say_so(bucket, proxy, monkeypatch):
    proxy.requester_pays = True
    for use in USES.values():
        with pytest.raises((StorageError, PermissionError), match="AccessDenied"):
            use(bucket.url)
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    talk_to(proxy.url, monkeypatch)
    for name, use in USES.items():
        assert use(bucket.url) or name in ("write", "send", "remove")


def test_the_error_of_a_refused_reading_names_the_variable_for_buckets_whose_readers_pay(bucket, proxy):
    proxy.requester_pays = True
    with pytest.raises(StorageError, match=r"AccessDenied: Access Denied\..* AWS_REQUEST_PAYER=requester one whose"):
        read_ranges(f"{bucket.url}/set/x.tar", [(0, 1)])
