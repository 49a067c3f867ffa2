"""An S3 endpoint on this machine for tests, and what the environment has to say so that it is found."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from warpcore.data import s3_requests


class Bucket:
    """A bucket and its client."""

    def __init__(self, client: Any, name: str):
        self.client, self.name, self.url = client, name, f"s3://{name}"
        self.endpoint = client.meta.endpoint_url
        client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"{self.url}/{key}"

    def upload(self, folder: Path, prefix: str = "") -> str:
        """The files of a folder as objects; returns the URL of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(prefix + str(path.relative_to(folder)), path.read_bytes())
        return f"{self.url}/{prefix}"

    def list_keys(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_endpoint, tmp_path, monkeypatch) -> Bucket:
    """An empty bucket; this process and those it starts find the endpoint in the environment."""
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    talk_to(s3_endpoint, monkeypatch)
    return Bucket(boto3.client("s3"), f"bucket-{abs(hash(str(tmp_path)))}")


def talk_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(s3_requests, "_BUCKETS", {})
