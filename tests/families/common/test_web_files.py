"""Files of the web are fetched within bounds, and what goes wrong is one clear error."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from families.common.web_files import fetch, is_url
from warpcore.errors import UserError

CONTENT = bytes(range(256)) * 100
pytestmark = pytest.mark.integration  # a server


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.png")
            return self.end_headers()
        if self.path == "/to_file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            return self.end_headers()
        if self.path == "/round":
            self.send_response(302)
            self.send_header("Location", "/round")
            return self.end_headers()
        if self.path == "/slow_headers":
            self.send_response(200)
            for number in range(20):
                self.send_header("X-Number", str(number))
                self.flush_headers()
                time.sleep(0.1)
            return self.end_headers()
        if self.path not in ("/file.png", "/cut", "/unannounced", "/slow", "/w%C3%A4lle%201.png?a=%20b"):
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/slow":
            for number in range(20):
                self.wfile.write(CONTENT[number : number + 1])
                time.sleep(0.05)
            return None
        self.wfile.write(CONTENT[: 100 if self.path == "/cut" else None])
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


def test_what_is_at_an_address_is_fetched(server):
    for place in ("file.png", "moved", "unannounced", "w\u00e4lle 1.png?a=%20b"):
        assert fetch(f"{server}/{place}", "reference_path", len(CONTENT), 10) == CONTENT


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing", r"reference_path: http://127\.0\.0\.1:\d+/nothing: the server answers 404"),
        ("cut", r"broke off after 100 bytes of 25\.6 kB"),
        ("slow", r"in time; 0\.3 seconds were waited"),
        ("slow_headers", r"in time; 0\.3 seconds were waited"),
        ("round", "the server answers 302 .*infinite loop"),
        ("to_file", "edirection to url 'file:"),
        ("a b", "/a b: the server answers 404"),
    ],
)
def test_what_goes_wrong_is_one_line(server, place, message):
    start, seconds = time.monotonic(), 0.3 if "slow" in place else 10
    with pytest.raises(UserError, match=message) as caught:
        fetch(f"{server}/{place}", "reference_path", len(CONTENT), seconds)
    assert time.monotonic() - start < seconds + 1.2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["file.png", "unannounced"])
def test_no_more_is_read_than_is_allowed(server, place):
    with pytest.raises(UserError, match=r"more than 1\.0 kB"):
        fetch(f"{server}/{place}", "reference_path", 1000, 10)


def test_nobody_answers():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1/a cannot be fetched: .*refused"):
        fetch("http://127.0.0.1:1/a", "reference_path", 1000, 10)


def test_paths_are_no_addresses():
    assert [is_url(one) for one in ("HTTPS://a/b", "http://a", "file:///a", "a.png", "s3://a")] == [
        True, True, False, False, False,
    ]  # fmt: skip
