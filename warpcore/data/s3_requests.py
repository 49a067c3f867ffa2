"""Requests to S3, and to everything that speaks its language.

boto3 finds credentials, region and endpoint as its users expect (profiles, SSO, roles, AWS_ENDPOINT_URL) and lists;
obstore moves the bytes. It goes on by itself where a body breaks off and backs off where it is told to slow down. What
is left to do here: ask for parts small enough that a trickle is noticed by the clock, and believe no answer of another
length or version than was asked for.

A process that was forked after its parent used S3 can't use it (obstore would hang): start processes with `spawn`.
"""

import difflib
import errno
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import botocore.session
import obstore
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.parsers import ResponseParserError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store

from warpcore.data.s3_errors import CREDENTIALS, MAX_TOLD, brief, is_refused, reason, refusal_hint, status_of
from warpcore.data.storage_protocol import ChangedShardError, StorageError, Version
from warpcore.errors import UserError
from warpcore.files import read_bytes
from warpcore.text import shortened

T = TypeVar("T")
REQUEST_BYTES = 2 << 20
"""A request asks for no more, so that REQUEST_SECONDS are a limit on how slowly it may be answered."""
REQUEST_SECONDS = 5
"""A request that takes longer goes on where it stopped on a new connection."""
SEND_SECONDS = 60
"""The same for a request that sends a file, or a part of one."""
PATIENCE_SECONDS = 180
"""Faults are tried again for so long before they stop the run."""
NUM_REQUESTS = 32
"""In flight at once, per process."""
CALL_ATTEMPTS, CALL_SECONDS = 6, 20
"""Of what boto3 asks, such as a page of a listing."""
CREDENTIALS_SECONDS = 300
"""How long obstore keeps credentials; botocore renews them well before they expire."""
REQUESTER_PAYS = ("requester", "true", "1")
"""Values of AWS_REQUEST_PAYER with which the account of the credentials pays for requests to the bucket of another."""


logger = logging.getLogger(__name__)


class _Refusal(Exception):
    """An answer that will be the same when it is asked for again: (HTTP status, text)."""


class _Fault(Exception):
    """Anything that may pass."""


class Bucket:
    """What one process needs to talk about one bucket."""

    def __init__(self, name: str):
        core = botocore.session.get_session()
        self.session = session = boto3.Session(botocore_session=core)
        unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
        requester_pays = os.environ.get("AWS_REQUEST_PAYER", "").lower() in REQUESTER_PAYS
        self._signed_headers = {"x-amz-request-payer": "requester"} if requester_pays else {}
        config = Config(
            signature_version=UNSIGNED if unsigned else "s3v4",
            retries={"mode": "standard", "total_max_attempts": CALL_ATTEMPTS},
            connect_timeout=CALL_SECONDS,
            read_timeout=CALL_SECONDS,
            max_pool_connections=NUM_REQUESTS,
            request_checksum_calculation="when_required",  # not every endpoint understands them
            response_checksum_validation="when_required",
        )
        self.name, self.client = name, session.client("s3", config=config)
        if requester_pays:
            self.client.meta.events.register("provide-client-params.s3", _requester_pays)
        url, region = self._locate(name)
        client_options = {"allow_http": url.startswith("http:")}
        self._authority = core.get_config_variable("ca_bundle")
        if self._authority:
            client_options["root_certificate"] = read_bytes(self._authority)
        lifetime = timedelta(seconds=CREDENTIALS_SECONDS)
        self.store, self.sender = (
            S3Store(
                name,
                endpoint=url,
                aws_endpoint_url_s3=url,  # or the variable of this name would count
                virtual_hosted_style_request=True,  # the URL is the bucket's, in whichever style
                region=region,
                skip_signature=unsigned,
                request_payer=requester_pays,
                credential_provider=None if unsigned else Boto3CredentialProvider(session, ttl=lifetime),
                client_options=client_options | {"timeout": timedelta(seconds=seconds)},
                retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=PATIENCE_SECONDS)},
            )
            for seconds in (REQUEST_SECONDS, SEND_SECONDS)
        )
        self.read = self._read
        """(key, start, stop, etag or "") -> bytes and version of what was answered. Raises _Refusal, _Fault."""

    def _read(self, key: str, start: int, stop: int, etag: str) -> tuple[bytes, Version]:
        options = {"range": (start, stop)} | ({"if_match": f'"{etag}"'} if etag else {})
        try:
            answer = obstore.get(self.store, key, options=options)
            return bytes(answer.bytes()), (answer.meta["size"], bare_etag(answer.meta["e_tag"]))
        except FileNotFoundError as error:
            raise _Refusal(404, brief(error)) from None
        except PreconditionError as error:
            raise _Refusal(412, brief(error)) from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise _Refusal(status_of(error) or 403, brief(error)) from None
        except ValueError as error:  # the key is none for obstore
            raise _Refusal(400, brief(error)) from None
        except BaseError as error:
            if "non-partial response" in str(error):
                self.read = self._read_by_url
                return self.read(key, start, stop, etag)
            raise _failure(status_of(error), brief(error)) from None

    def _read_by_url(self, key: str, start: int, stop: int, _: str) -> tuple[bytes, Version]:
        """The same for endpoints that send a part with status 200, for which obstore has no use (rclone)."""
        url = self.client.generate_presigned_url("get_object", {"Bucket": self.name, "Key": key})
        request = Request(url, headers={"Range": f"bytes={start}-{stop - 1}"} | self._signed_headers)
        deadline, data = time.monotonic() + REQUEST_SECONDS, bytearray()
        try:
            with urlopen(request, timeout=REQUEST_SECONDS, context=self._tls) as answer:
                part = re.fullmatch(rf"bytes {start}-\d+/(\d+)", answer.headers["Content-Range"] or "")
                if not part:
                    raise _Refusal(answer.status, "the endpoint can't send parts of an object")
                while piece := answer.read1(1 << 20):
                    data += piece
                    if time.monotonic() > deadline:
                        raise _Fault(f"no more than {len(data)} bytes in {REQUEST_SECONDS} seconds")
        except HTTPError as error:
            text = ": ".join(filter(None, [str(error), reason(error.read().decode(errors="replace"))]))
            raise _failure(error.code, text) from None
        except (OSError, HTTPException) as error:
            raise _Fault(str(error)) from None
        return bytes(data), (int(part[1]), bare_etag(answer.headers["ETag"]))

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._authority)

    def _locate(self, name: str) -> tuple[str, str]:
        """The bucket's URL and region, as boto3 finds them out by asking for the bucket."""
        asked: list[str] = []
        self.client.meta.events.register("before-send.s3.HeadBucket", lambda request, **_: asked.append(request.url))
        try:
            answer = self.client.head_bucket(Bucket=name)["ResponseMetadata"]
        except ClientError as error:
            answer = error.response["ResponseMetadata"]
            if answer["HTTPStatusCode"] == 404:
                raise StorageError(self._no_bucket(name)) from None
            # Whatever else is wrong, the next request will say it better: this one has no body.
        region = answer["HTTPHeaders"].get("x-amz-bucket-region")
        return asked[-1].rstrip("/"), region or self.client.meta.region_name or "us-east-1"

    def _no_bucket(self, name: str) -> str:
        near: list[str] = []
        with suppress(ClientError, BotoCoreError):  # listing them may not be allowed
            names = [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Near it: {', '.join(near)}" if near else ""
        return f"s3://{name}: there is no such bucket at {self.client.meta.endpoint_url}.{hint}"


def _requester_pays(params: dict[str, Any], model: Any, **_: Any) -> dict[str, Any]:
    """The parameters of a call of boto3, for operations that have to say who pays."""
    return params | ({"RequestPayer": "requester"} if "RequestPayer" in model.input_shape.members else {})


_LOCK = threading.Lock()
_POOL = ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="s3")
_BUCKETS: dict[str, Bucket] = {}
_PROCESS = os.getpid()


def open_bucket(name: str) -> Bucket:
    """The one of this process. Raises StorageError where there is none, or no way to it."""
    _check_process()
    with _LOCK:
        if name not in _BUCKETS:
            with _explained(f"s3://{name}"):
                _BUCKETS[name] = Bucket(name)
    return _BUCKETS[name]


def with_bucket(name: str, call: Callable[[Bucket], T]) -> T:
    """What `call` returns; where its credentials are refused, it is called once more if there are others by now."""
    bucket = open_bucket(name)
    try:
        return call(bucket)
    except (ClientError, BaseError) as error:
        fresh = look_again(bucket) if is_refused(status_of(error), str(error)) else None
        if fresh is None:
            raise
    return call(fresh)


def look_again(bucket: Bucket) -> Bucket | None:
    """The bucket with the credentials that are found now; None where they are those that it has.

    boto3 reads files with credentials once; those that a role or a login gives it renews itself.
    """
    with _LOCK, _explained(f"s3://{bucket.name}"):
        if _BUCKETS.get(bucket.name) in (None, bucket):  # else another thread looked meanwhile
            found = botocore.session.get_session().get_credentials()
            if _frozen(found) == _frozen(bucket.session.get_credentials()):
                return None
            _BUCKETS[bucket.name] = Bucket(bucket.name)
            logger.warning("s3://%s: refused, going on with the credentials that are there now", bucket.name)
        return _BUCKETS[bucket.name]


def _frozen(credentials: Any) -> Any:
    return credentials and credentials.get_frozen_credentials()


def pool() -> ThreadPoolExecutor:
    """The threads of this process that wait for answers."""
    _check_process()
    return _POOL


def _check_process() -> None:
    if os.getpid() != _PROCESS:
        raise RuntimeError("this process was forked from one that uses S3, where it would hang: start it with spawn")


def get(url: str, start: int, stop: int, version: Version | None = None) -> tuple[bytes, Version]:
    """Bytes [start, stop) of an object, fewer only where it ends before that, and its version.

    Raises:
        FileNotFoundError: there is none, and no `version` was asked for.
        ChangedShardError: it is of another version, or gone.
        StorageError: it can't be read, and that for PATIENCE_SECONDS.
    """
    name, key = split(url)
    bucket, pause, deadline = open_bucket(name), 0.1, time.monotonic() + PATIENCE_SECONDS
    looked_again = False
    while True:
        try:
            data, found = bucket.read(key, start, stop, version[1] if version else "")
            if version and not _same(version, found):  # some endpoints ignore If-Match
                raise ChangedShardError(url)
            if len(data) == min(stop, found[0]) - start:
                return data, found
            fault = f"asked for {stop - start} bytes, got {len(data)}"
        except _Refusal as refusal:
            status, fault = refusal.args
            if version and status in (404, 412, 416):
                raise ChangedShardError(url) from None
            if status == 404:
                raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
            if status == 416:  # it ends before `start`
                return b"", (start, "")
            if is_refused(status, fault) and not looked_again:
                bucket, looked_again = look_again(bucket) or bucket, True
            elif status != 412:  # that is: it changed between two parts of an answer
                raise StorageError(f"{url} can't be read: {fault}{refusal_hint(status, fault)}") from None
        except _Fault as passing:
            fault = str(passing)
        if time.monotonic() + pause > deadline:
            raise StorageError(f"{url} can't be read, tried for {PATIENCE_SECONDS} seconds: {fault}")
        time.sleep(pause)
        pause = min(2 * pause, REQUEST_SECONDS)


def _failure(status: int, text: str) -> _Refusal | _Fault:
    """A timeout (408) and too many requests (429) pass, other statuses from 400 to 499 don't."""
    return _Refusal(status, text) if 400 <= status < 500 and status not in (408, 429) else _Fault(text)


def put(url: str, content: bytes) -> None:
    """Replace an object. Raises PermissionError, StorageError."""
    name, key = split(url)
    try:
        with_bucket(name, lambda bucket: obstore.put(bucket.sender, key, content))
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, brief(error), url) from None
    except BaseError as error:
        hint = refusal_hint(status_of(error), brief(error))
        raise StorageError(f"{url} can't be written: {brief(error)}{hint}") from None


def ask(url: str, operation: str, **parameters: Any) -> dict[str, Any]:
    """What boto3 answers to an operation on the URL's bucket.

    Raises:
        FileNotFoundError, StorageError
    """
    name = split(url)[0]

    def call(bucket: Bucket) -> dict[str, Any]:
        for _ in range(CALL_ATTEMPTS - 1):
            try:
                return getattr(bucket.client, operation)(Bucket=name, **parameters)
            except ResponseParserError as error:  # half an answer, which boto3 doesn't ask for again
                if "amplification" in str(error):  # entities that multiply: a whole one, and slow to refuse
                    raise
        return getattr(bucket.client, operation)(Bucket=name, **parameters)

    with _explained(url):
        try:
            return with_bucket(name, call)
        except ClientError as error:
            if operation == "head_object" and is_refused(status_of(error), str(error)):
                _say_why(open_bucket(name), **parameters)
            raise


def _say_why(bucket: Bucket, **parameters: Any) -> None:
    """Raise the reason for which an object is refused: the answer to a HEAD has no body that says it."""
    bucket.client.get_object(Bucket=bucket.name, Range="bytes=0-0", **parameters)["Body"].close()


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """What boto3 and obstore raise becomes StorageError, or FileNotFoundError."""
    try:
        yield
    except NoCredentialsError:
        raise StorageError(f"{url}: there are no credentials. {CREDENTIALS}") from None
    except ClientError as error:
        status = status_of(error)
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        text = shortened(str(error).rstrip("."), MAX_TOLD)
        raise StorageError(f"{url}: {text}{refusal_hint(status, text)}") from None
    except (BotoCoreError, ResponseParserError, ValueError, OverflowError) as error:  # numbers that are none, too
        if isinstance(error, UserError):
            raise
        raise StorageError(f"{url}: the answer cannot be read: {shortened(str(error), MAX_TOLD)}") from None
    except BaseError as error:
        raise StorageError(f"{url}: {brief(error)}") from None


def split(url: str) -> tuple[str, str]:
    """Bucket and key."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", url, re.DOTALL)
    if not match:
        raise UserError(f"{url!r}: an S3 URL looks like s3://bucket/folder/00000.tar")
    return match[1], match[2]


def bare_etag(etag: str | None) -> str:
    """Listings and answers need not agree on quotes."""
    return (etag or "").removeprefix("W/").strip('"')


def _same(version: Version, found: Version) -> bool:
    return version[0] == found[0] and (version[1] == found[1] or not (version[1] and found[1]))
