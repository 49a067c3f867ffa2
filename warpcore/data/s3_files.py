"""Files that go to S3 and come back: checkpoints, weights, metrics, samples."""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import obstore
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError

from warpcore.data import s3_requests
from warpcore.data.s3 import S3Storage
from warpcore.data.s3_errors import brief, refusal_hint, status_of
from warpcore.data.s3_listing import list_objects
from warpcore.data.s3_requests import ask, bare_etag, split, with_bucket
from warpcore.data.storage import in_parallel
from warpcore.data.storage_protocol import StorageError
from warpcore.files import open_plain

LEAST_PART_BYTES = 8 << 20
MOST_PARTS = 9_000
"""S3 takes 10,000 parts of a file."""
FETCHED_BYTES = 64 << 20
"""What of a file is in memory while it is fetched."""
NOT_IMPLEMENTED, NOT_AS_EXPECTED = 501, (404, 409, 412)

logger = logging.getLogger(__name__)


def send(path: Path, url: str) -> None:
    """Make a file an object, which has all of it or is what it was before. Raises OSError, StorageError."""
    name, key = split(url)
    part_bytes = max(LEAST_PART_BYTES, path.stat().st_size // MOST_PARTS)
    pause, deadline = 0.1, time.monotonic() + s3_requests.PATIENCE_SECONDS
    while True:
        try:
            with_bucket(name, lambda bucket: obstore.put(bucket.sender, key, path, chunk_size=part_bytes))
            return
        except (BaseError, FileNotFoundError) as error:  # the latter is said of the parts of a file, too
            if not path.exists():
                raise FileNotFoundError(path) from error
            hint = refusal_hint(status_of(error), brief(error))
            if hint or time.monotonic() + pause > deadline:
                raise StorageError(f"{url} can't be written: {brief(error)}{hint}") from None
        time.sleep(pause)
        pause = min(2 * pause, s3_requests.REQUEST_SECONDS)


def fetch(url: str, path: Path, size_bytes: int) -> str:
    """Copy an object of `size_bytes` to a file, which appears when it is whole; returns its SHA-256.

    Raises:
        ChangedShardError, OSError, StorageError: it can't be read, or written here.
    """
    storage, sha256 = S3Storage(), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open_plain(partial, "wb") as file:
        for offset in range(0, size_bytes, FETCHED_BYTES):
            span = offset, min(FETCHED_BYTES, size_bytes - offset)
            (block,) = storage.read_ranges(url, [span], (size_bytes, ""))
            sha256.update(block)
            file.write(block)
    partial.replace(path)
    return sha256.hexdigest()


def put_if(url: str, content: bytes, etag: str | None) -> str | None:
    """Write a small object if it is still of this etag (None: if there is none); its new etag, None if it is not.

    An endpoint that knows no such condition writes it in any case: read back what is there.
    """
    name, key = split(url)
    condition = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}

    def put(bucket: s3_requests.Bucket) -> dict:
        return bucket.client.put_object(Bucket=name, Key=key, Body=content, **condition)

    try:
        return bare_etag(with_bucket(name, put)["ETag"])
    except ClientError as error:
        status = status_of(error)
        if status in NOT_AS_EXPECTED:
            return None
        if status != NOT_IMPLEMENTED:
            hint = refusal_hint(status, str(error))
            raise StorageError(f"{url} can't be written: {str(error).rstrip('.')}{hint}") from None
    except BotoCoreError as error:
        raise StorageError(f"{url} can't be written: {error}") from None
    return bare_etag(ask(url, "put_object", Key=key, Body=content)["ETag"])


def sizes_below(url: str) -> dict[str, int]:
    """Sizes in bytes of all objects whose URL begins with `url`, by the rest of it."""
    bucket, prefix = split(url)
    return {found.removeprefix(url): size for found, size, _ in list_objects(bucket, prefix)}


def remove(urls: Sequence[str]) -> None:
    """Remove objects. Raises StorageError."""
    for _ in in_parallel(_remove, [(url,) for url in urls]):
        pass


def _remove(url: str) -> None:
    ask(url, "delete_object", Key=split(url)[1])


def abort_unfinished(url: str) -> None:
    """Forget the parts of files whose sending was killed: they are kept, and paid for, otherwise."""
    try:
        found = ask(url, "list_multipart_uploads", Prefix=split(url)[1])
        for upload in found.get("Uploads", ()):
            ask(url, "abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
    except (StorageError, FileNotFoundError) as error:  # it is no more than tidiness, and not allowed everywhere
        logger.info("parts of unfinished files stay: %s", error)
