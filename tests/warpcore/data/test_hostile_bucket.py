"""A bucket of a stranger: whatever its endpoint answers, there is one error soon, and it is short."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest

from tests.s3_server import talk_to
from warpcore.data import s3_files, s3_listing, s3_requests
from warpcore.data.shards import resolve_sources
from warpcore.data.storage import read_ranges, storage_for
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Endpoint:
    """Answers every GET with `body`; headers in `headers` replace or add to the usual ones."""

    def __init__(self):
        endpoint = self
        self.body, self.headers, self.num_requests, self.stalls = b"", {}, 0, False

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer({"Content-Length": 10} | (endpoint.headers if self.path.count("/") > 1 else {}))

            def do_GET(self):
                endpoint.num_requests += 1
                self.answer({"Content-Length": len(endpoint.body)} | endpoint.headers)
                if endpoint.stalls:
                    time.sleep(2)
                else:
                    self.wfile.write(endpoint.body)
                self.close_connection = True

            def answer(self, headers):
                self.send_response(206 if "Content-Range" in headers else 200)
                for name, value in headers.items():
                    if value is not None:
                        self.send_header(name, str(value))
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "REQUEST_SECONDS": 0.3,
        "PATIENCE_SECONDS": 1,
        "CALL_ATTEMPTS": 2,
        "CALL_SECONDS": 0.3,
    }.items():
        monkeypatch.setattr(s3_requests, name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    endpoint = Endpoint()
    talk_to(endpoint.url, monkeypatch)
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def listing(*entries: str, more: str = "") -> bytes:
    contents = "".join(f"<Contents>{entry}</Contents>" for entry in entries)
    return f"<?xml version='1.0'?><ListBucketResult>{contents}{more}</ListBucketResult>".encode()


def entry(key: str, size: object = 1) -> str:
    return f"<Key>{key}</Key><Size>{size}</Size>"


BOMB = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
CUT_OFF = "<IsTruncated>true</IsTruncated>"
LISTINGS = {
    "entities that multiply": f'<!DOCTYPE x [<!ENTITY a0 "lol">{BOMB}]><x>&a9;</x>'.encode(),
    "a file of this machine": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><ListBucketResult>&a;</ListBucketResult>',
    "no XML": b"\0" * 100_000,
    "another prefix": listing(entry("/etc/x.tar")),
    "a way out": listing(entry("../x.tar")),
    "no key": listing("<Size>1</Size>"),
    "no size": listing("<Key>set/x.tar</Key>"),
    "a size below zero": listing(entry("set/x.tar", -1)),
    "a size that is none": listing(entry("set/x.tar", "many")),
    "no token": listing(entry("set/x.tar"), more=CUT_OFF),
    "the same page again": listing(
        entry("set/x.tar"), more=f"{CUT_OFF}<NextContinuationToken>a</NextContinuationToken>"
    ),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_strange_listing_is_one_short_error(endpoint, name):
    endpoint.body = LISTINGS[name]
    started = time.process_time()
    for use in (lambda: resolve_sources("s3://bucket/set/"), lambda: s3_files.sizes_below("s3://bucket/set/")):
        with pytest.raises(UserError, match=r"s3://bucket/set") as error:
            use()
        assert len(str(error.value)) < 3000
        assert "root:" not in str(error.value)
    assert time.process_time() - started < 8
    assert endpoint.num_requests <= 12


def test_objects_are_listed_up_to_a_bound(endpoint, monkeypatch):
    monkeypatch.setattr(s3_listing, "MAX_LISTED", 0)
    endpoint.body = listing(entry("set/x.tar"), more=f"{CUT_OFF}<NextContinuationToken>a</NextContinuationToken>")
    with pytest.raises(UserError, match="does not end; listed 1 objects"):
        resolve_sources("s3://bucket/set/")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-9/10", "Content-Length": 5},
        {"Content-Range": "bytes 0-9/99999999999999999999", "Content-Length": 10},
        {"Content-Range": "bytes 5-9/10", "Content-Length": 10},
        {"Content-Range": "bytes 0-9/10", "Content-Length": 10_000_000_000},
        {"Content-Range": "nonsense", "Content-Length": 10},
    ],
)
def test_lies_about_lengths_and_ranges_give_an_error_and_no_other_bytes(endpoint, headers):
    endpoint.body, endpoint.headers = (
        b"0123456789",
        headers | {"ETag": '"a"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
    )
    started = time.monotonic()
    with pytest.raises(UserError, match=r"s3://bucket/x\.tar"):
        read_ranges("s3://bucket/x.tar", [(0, 10)])
    assert time.monotonic() - started < 30


def test_a_bucket_that_stalls_is_given_up(endpoint):
    endpoint.stalls, endpoint.body = True, b"0123456789"
    endpoint.headers = {"Content-Range": "bytes 0-9/10", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    started = time.monotonic()
    for use in (lambda: read_ranges("s3://bucket/x.tar", [(0, 10)]), lambda: resolve_sources("s3://bucket/set/")):
        with pytest.raises(UserError, match="s3://bucket/"):
            use()
    assert time.monotonic() - started < 30


def test_an_object_without_a_size_is_refused(endpoint):
    endpoint.headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    with pytest.raises(UserError, match="does not say how large it is"):
        storage_for("s3://bucket/x.tar").stat("s3://bucket/x.tar")
