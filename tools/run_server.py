"""Serves the run page to this machine's browsers, and nothing else: no other machine, no other site, no other files.

It listens on 127.0.0.1 and answers to that name and to localhost alone, so that no page of another site reaches it by
a name of its own (DNS rebinding). Files are looked up among those that were listed, so that no path leads elsewhere.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tools import pages
from tools.run_places import RunPlace
from tools.run_reader import Run, Runs
from warpcore.errors import UserError

HOST = "127.0.0.1"
PAGE = "runs.html"
PART_BYTES = 2**20
MOST_BUCKETS = 4_000
FILES = {name: pages.TYPES[PurePosixPath(name).suffix] for name in pages.names_in(PAGE)}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """The page of the runs in a place. port: 0 for any that is free."""

    daemon_threads = True

    def __init__(self, place: RunPlace, port: int):
        self.runs = Runs(place)
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def handle(self) -> None:
        with suppress(ConnectionError):  # the browser has left
            super().handle()

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET

    def log_message(self, format: str, *about: Any) -> None:
        """A request is nothing to tell of."""

    def _answer(self) -> None:
        if not self._is_from_here():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for browsers of this machine\n")
            return
        try:
            address = urlsplit(self.path)
            question = {key: values[-1] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
            match address.path.split("/")[1:]:
                case [""]:
                    self._send(HTTPStatus.OK, pages.TYPES[".html"], pages.page_file(PAGE).encode())
                case ["favicon.ico"]:
                    self._send(HTTPStatus.OK, "image/png", b"")
                case [name] if name in FILES:
                    self._send(HTTPStatus.OK, FILES[name], pages.page_file(name).encode())
                case ["api", "runs"]:
                    self._json(overview(self.server.runs))
                case ["api", number, "details"]:
                    self._json(self.server.runs.run(number).details())
                case ["api", number, "curve"]:
                    self._json(curve(self.server.runs.run(number), question))
                case ["api", number, "sheet", update]:
                    self._json(self.server.runs.run(number).sheet(_whole(update)))
                case ["picture", number, file]:
                    self._send_file(*self.server.runs.run(number).picture(file))
                case _:
                    raise LookupError(address.path)
        except LookupError:
            self._json({"error": "it is not there"}, HTTPStatus.NOT_FOUND)
        except UserError as error:
            self._json({"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE)
        except (ValueError, OverflowError):
            self._json({"error": "a question that this page does not ask"}, HTTPStatus.BAD_REQUEST)

    def _is_from_here(self) -> bool:
        port = self.server.server_port
        return self.headers.get("Host", "").lower() in (f"{HOST}:{port}", f"localhost:{port}") and (
            self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        )

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", pages.as_json(value).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self._begin(status, kind, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(size)} | HEADERS).items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, name: str, kind: str, size: int) -> None:
        parts = file_parts(self.server.runs.place, name, size)
        if (first := next(parts, b"")) == b"":  # it vanished since it was listed
            raise LookupError(name)
        self._begin(HTTPStatus.OK, kind, size)
        if self.command == "HEAD":
            return
        sent = self.wfile.write(first)
        for part in parts:
            sent += self.wfile.write(part)
        if sent < size:  # it has become shorter: the browser has to see that something is missing
            self.close_connection = True


def file_parts(place: RunPlace, name: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, piece by piece; it ends early where the file does."""
    start = 0
    while start < size and (part := place.read(name, start, min(PART_BYTES, size - start))):
        yield part
        start += len(part)


def overview(runs: Runs) -> dict[str, Any]:
    """What the page shows first."""
    return {"place": runs.place.name, "seconds": runs.place.seconds, "runs": [run.summary() for run in runs.all()]}


def curve(run: Run, question: dict[str, str]) -> dict[str, Any]:
    """A curve; at `first`, of some lines of a long file, if that is quicker. Raises ValueError for no question."""
    if "metric" not in question:
        raise ValueError("no metric")
    start, end = (_amount(question[key]) if key in question else None for key in ("start", "end"))
    buckets = min(max(_whole(question.get("buckets", "1000")), 1), MOST_BUCKETS)
    by_time = question.get("by") == "time"
    sketched = "first" in question and run.place.is_near and not run.metrics.has(question["metric"])
    metrics = run.metrics.sketch() if sketched else run.metrics
    found = metrics.curve(question["metric"], by_time, buckets, start, end)
    return {**found, "names": metrics.names, "whole": metrics is run.metrics}


def _whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text):
        raise ValueError("no number")
    return int(text)


def _amount(text: str) -> float:
    number = float(text)
    if not abs(number) < 1e15:
        raise ValueError("no number")
    return number
