"""What lies below a prefix of a bucket, as its endpoint lists it: bounded, as the bucket may be a stranger's."""

from collections.abc import Iterator

from warpcore.data.s3_requests import ask, bare_etag
from warpcore.data.storage_protocol import TAR_ENDINGS, StorageError
from warpcore.progress_bar import ProgressBar
from warpcore.text import brief

MAX_LISTED = 20_000_000
"""Objects below one prefix: more than any data set has; a listing may have no end."""


def list_tars(bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """(URL, size in bytes, etag) of every tar, compressed or not, whose key starts with the prefix."""
    return (one for one in list_objects(bucket, prefix) if one[0].endswith(TAR_ENDINGS))


def list_objects(bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """The same of every object.

    Raises:
        StorageError: the listing does not end, or has an entry of another prefix or without a size.
    """
    url, parameters = f"s3://{bucket}/{prefix}", {"Prefix": prefix}
    with ProgressBar(desc=f"listing {url}", unit=" objects", delay=2, mininterval=2) as progress:
        while parameters:
            page = ask(url, "list_objects_v2", **parameters)
            entries = page.get("Contents", ())
            for entry in entries:
                key, size = entry.get("Key", ""), entry.get("Size", -1)
                if not key.startswith(prefix) or "\0" in key or size < 0:
                    raise StorageError(f"{url}: the listing has a strange entry: {brief(entry)}")
                yield f"s3://{bucket}/{key}", size, bare_etag(entry.get("ETag"))
            progress.update(len(entries))
            token, before = page.get("NextContinuationToken"), parameters.get("ContinuationToken")
            parameters = page.get("IsTruncated") and {"Prefix": prefix, "ContinuationToken": token}
            if parameters and (not token or token == before or progress.n > MAX_LISTED):
                raise StorageError(f"{url}: the listing does not end; listed {progress.n} objects")
