"""Small files of the web, fetched into memory: no more bytes, and for no longer, than the caller allows."""

import string
import time
from concurrent.futures import Future
from http.client import HTTPException
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from warpcore.errors import UserError
from warpcore.text import format_bytes, shortened

PIECE_BYTES = 1 << 20
SCHEMES = ("http://", "https://")


def is_url(place: str) -> bool:
    return place.lower().startswith(SCHEMES)


def fetch(url: str, key: str, max_bytes: int, seconds: float) -> bytes:
    """What is at an address that begins with http:// or https://; so do those that it leads to.

    Args:
        key: the config key that named it, for errors.
        max_bytes: of the file. seconds: from the request to its last byte.

    Raises:
        UserError: nobody answers, there is no such file, or it is too large or too slow.
    """
    where, answer = f"{key}: {shortened(url)}", Future()
    # Names that are looked up, headers and further addresses have no limit of their own.
    Thread(target=_fetch_into, args=(answer, url, where, max_bytes, seconds), daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise UserError(f"{where} did not come in time; {seconds:g} seconds were waited") from None


def _fetch_into(answer: Future, url: str, where: str, max_bytes: int, seconds: float) -> None:
    try:
        answer.set_result(_fetched(url, where, max_bytes, seconds))
    except Exception as error:
        answer.set_exception(error)


def _fetched(url: str, where: str, max_bytes: int, seconds: float) -> bytes:
    """See `fetch`. Before the file's first byte, only the time from one byte to the next is limited."""
    deadline, found = time.monotonic() + seconds, bytearray()
    try:
        address = quote(url, safe=string.punctuation)  # as browsers send what is no ASCII, or a space
        with _opener().open(Request(address, headers={"User-Agent": "warpcore"}), timeout=seconds) as answer:
            announced = answer.headers.get("Content-Length", "")
            if announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes:
                raise UserError(f"{where} has {format_bytes(int(announced))}, more than {format_bytes(max_bytes)}")
            while piece := answer.read1(PIECE_BYTES):
                found += piece
                if len(found) > max_bytes:
                    raise UserError(f"{where} has more than {format_bytes(max_bytes)}")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except (UserError, TimeoutError):
        raise
    except HTTPError as error:
        reason = " ".join(str(error.reason).split())
        raise UserError(f"{where}: the server answers {error.code} {shortened(reason)}") from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: what no address may hold
        raise UserError(f"{where} cannot be fetched: {shortened(str(getattr(error, 'reason', error)))}") from None
    if announced.isdecimal() and len(found) < int(announced):
        raise UserError(f"{where} broke off after {format_bytes(len(found))} of {format_bytes(int(announced))}")
    return bytes(found)


def _opener() -> OpenerDirector:
    """Without handlers for files, FTP and data, to which an address might lead."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, UnknownHandler, HTTPHandler, HTTPSHandler, HTTPRedirectHandler,
                    HTTPDefaultErrorHandler, HTTPErrorProcessor):  # fmt: skip
        opener.add_handler(handler())
    return opener
