"""Files and small objects on their way to S3."""

import pytest

from tests.faulty_proxy import FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from warpcore.data import s3_requests
from warpcore.data.s3_files import put_if
from warpcore.data.s3_requests import open_bucket
from warpcore.data.storage_protocol import StorageError


def test_an_object_is_written_on_a_condition_or_it_is_said_why_not(bucket, monkeypatch):
    url = f"{bucket.url}/x"
    first = put_if(url, b"1", None)
    assert put_if(url, b"2", None) is None
    second = put_if(url, b"2", first)
    assert put_if(url, b"3", first) is None
    assert None not in (first, second)
    assert bucket.client.get_object(Bucket=bucket.name, Key="x")["Body"].read() == b"2"
    monkeypatch.setattr(s3_requests, "CALL_ATTEMPTS", 1)
    with FaultyProxy(bucket.endpoint, faults=("503",)) as proxy:
        talk_to(proxy.url, monkeypatch)
        open_bucket(bucket.name)
        proxy.share = 1.0
        with pytest.raises(StorageError, match=r"/x can't be written: .*SlowDown"):
            put_if(url, b"3", second)
    with pytest.raises(StorageError, match=r"/x can't be written: Could not connect to the endpoint"):
        put_if(url, b"3", second)
