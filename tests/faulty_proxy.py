"""A proxy that treats a share of the requests badly, for tests of what happens when a network does."""

import asyncio
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Self

from aiohttp import ClientSession, web
from yarl import URL

FAULTS = ("reset", "truncated", "trickle", "503", "wrong length")
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_NOT_FORWARDED = ("transfer-encoding", "connection")


class FaultyProxy:
    """Forwards HTTP to `target` from a thread of its own, a context manager; `url` is where it listens.

    faults: the kinds that the unlucky requests get in turn. "reset" and "truncated" break off in the middle of the
    body, "trickle" goes on a byte at a time, "503" asks to slow down, "wrong length" is an answer that is well-formed,
    but half as long as what was asked for. Where there is no body, it is a 503.

    on_fault: called in the middle of every body that breaks off. refused: methods that get a 403. ignored: headers
    that are not passed on, in lower case. part_status: of answers that are a part of an object. on_request: called
    with method and path of every request before it is passed on. not_implemented: headers, in lower case, with which a
    PUT gets a 501. refused_keys: by access key, status and code of the answer to what is signed with it.
    requester_pays: requests for objects and listings get a 403 unless they say that the asking account pays.
    """

    def __init__(
        self,
        target: str,
        share: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        seed: int = 1,
        on_fault: Callable[[], object] = lambda: None,
        refused: tuple[str, ...] = (),
        ignored: tuple[str, ...] = (),
        part_status: int = 206,
        on_request: Callable[[str, str], object] = lambda method, path: None,
        not_implemented: tuple[str, ...] = (),
        refused_keys: Mapping[str, tuple[int, str]] | None = None,
        requester_pays: bool = False,
    ):
        self.target, self.share, self.faults = target, share, faults
        self.on_fault, self.refused, self.ignored, self.part_status = on_fault, refused, ignored, part_status
        self.on_request, self.not_implemented = on_request, not_implemented
        self.refused_keys, self.requester_pays = dict(refused_keys or {}), requester_pays
        self.num_requests = 0
        self.met: Counter[str] = Counter()
        """How often each fault was met."""
        self.gets: Counter[str] = Counter()
        """How often each path was asked for by GET."""
        self._random = Random(seed)
        self._loop = asyncio.new_event_loop()
        self._started, self._stopping = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        async with ClientSession(auto_decompress=False) as self._session:
            runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = "http://{}:{}".format(*runner.addresses[0])
            self._started.set()
            await self._stopping.wait()
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.num_requests += 1
        self.gets[request.path] += request.method == "GET"
        self.on_request(request.method, request.path)
        fault = None
        if self._random.random() < self.share:
            fault = self.faults[self.met.total() % len(self.faults)]
            self.met[fault] += 1
        target = URL(self.target + request.raw_path, encoded=True)
        not_forwarded = (*_NOT_FORWARDED, *self.ignored)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in not_forwarded}
        if request.headers.get("Expect") == "100-continue":  # else boto3 waits a second before it sends a body
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        content = await request.content.read()  # or what is left of it would be the next request
        if request.method in self.refused:
            return web.Response(status=403, body=_DENIED if request.method != "HEAD" else None)
        signed = request.headers.get("Authorization", "") + request.query_string
        for key, (status, code) in self.refused_keys.items():
            if re.search(rf"(Credential|AWSAccessKeyId)={key}\W", f"{signed}&"):
                body = f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>It is {code}.</Message></Error>"
                return web.Response(status=status, body=body.encode() if request.method != "HEAD" else None)
        says_who_pays = "x-amz-request-payer" in (*map(str.lower, request.headers), *map(str.lower, request.query))
        if self.requester_pays and not says_who_pays and (request.path.count("/") > 1 or request.method != "HEAD"):
            return web.Response(status=403, body=_DENIED if request.method != "HEAD" else None)
        if request.method == "PUT" and any(name in self.not_implemented for name in map(str.lower, request.headers)):
            return web.Response(status=501, body=_DENIED)
        if fault == "503":
            return web.Response(status=503, body=_SLOW_DOWN if request.method != "HEAD" else None)
        async with self._session.request(request.method, target, headers=headers, data=content) as given:
            body = await given.read()
            headers = {name: value for name, value in given.headers.items() if name.lower() not in _NOT_FORWARDED}
        if fault and len(body) < 2:
            return web.Response(status=503)
        if fault == "wrong length":
            body = body[: len(body) // 2]
            headers["Content-Length"] = str(len(body))
        status = self.part_status if given.status == 206 else given.status
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if fault in ("reset", "truncated", "trickle"):
            half = len(body) // 2
            await response.write(body[:half])
            await asyncio.to_thread(self.on_fault)
            if fault == "trickle":
                await _trickle(request.transport, response, body[half:])
            else:
                await _break_off(request.transport, fault)
        else:
            await response.write(body)
        return response


async def _trickle(transport: asyncio.Transport, response: web.StreamResponse, body: bytes) -> None:
    for place in range(len(body)):
        if transport.is_closing():
            return
        await response.write(body[place : place + 1])
        await asyncio.sleep(0.05)


async def _break_off(transport: asyncio.Transport, fault: str) -> None:
    if fault == "reset":
        await asyncio.sleep(0.01)  # or what was written would be lost with it
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
