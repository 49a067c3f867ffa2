"""What lies on S3 is fetched only up to the size that the program itself could have written."""

import json

import pytest

from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.warpcore.test_s3_checkpoints import get, train_remote
from tests.warpcore.test_s3_checkpoints import local as local
from tests.warpcore.test_s3_checkpoints import remote as remote
from tests.warpcore.test_s3_checkpoints import shard as shard
from tests.warpcore.tiny import TinyConfig
from warpcore.checkpoint import CheckpointError
from warpcore.checkpoint_table import MAX_STATE_BYTES
from warpcore.config import make_config
from warpcore.data.s3_files import fetch
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError
from warpcore.safe_json import MAX_JSON_BYTES
from warpcore.unused_keys import check_unused

pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_what_is_longer_than_a_run_writes_it_is_not_fetched(bucket, remote, caplog, monkeypatch, name):
    train_remote(remote | {"updates": 8})
    if name == "manifest.json":
        bucket.put(f"runs/tiny/state/00000008/{name}", b"[" * (MAX_JSON_BYTES + 1))
    else:
        manifest = json.loads(get(bucket, "state/00000008/manifest.json"))
        manifest["files"][name] = {"bytes": MAX_STATE_BYTES + 1, "sha256": "0"}
        bucket.put("runs/tiny/state/00000008/manifest.json", json.dumps(manifest).encode())
    fetched = []
    monkeypatch.setattr(
        "warpcore.s3_place.fetch", lambda url, path, size: fetched.append(size) or fetch(url, path, size)
    )
    train_remote(remote | {"updates": 9})
    assert max(fetched) < 1_000_000
    reason = "is longer than 32 MiB" if name == "manifest.json" else "lists a state.json of more than 128 MiB"
    assert f"update 8 is damaged (manifest.json {reason})" in caplog.text
    assert "goes on from update 4" in caplog.text


def test_metrics_that_no_run_wrote_are_not_fetched(bucket, remote, monkeypatch):
    train_remote(remote | {"updates": 4})
    monkeypatch.setattr("warpcore.s3_place.MAX_CONTINUED_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"runs/tiny/metrics.jsonl has more than 0 MiB, which no run writes"):
        train_remote(remote)


def test_a_saved_config_and_a_list_of_tars_are_read_up_to_a_bound(bucket, remote, monkeypatch):
    for name in ("runs/tiny/config.yaml", "tars.yml"):
        bucket.put(name, b"#" * (2**26 + 1))
    config = make_config(TinyConfig, remote)
    with pytest.raises(UserError, match=r"runs/tiny/config.yaml has more than 9 MiB"):
        check_unused(config, ["updates"], {})
    with pytest.raises(UserError, match=r"tars.yml has more than 64 MiB"):
        resolve_sources(f"{bucket.url}/tars.yml")
