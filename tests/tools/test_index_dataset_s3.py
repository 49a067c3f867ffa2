"""Indexing a bucket in parallel, and again after it was interrupted."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faulty_proxy import FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from tests.warpcore.data.tars import catalog_of, write_shard
from tools.index_dataset import main
from warpcore.data.catalog import MANIFEST_NAME
from warpcore.data.index import INDEX_SUFFIX
from warpcore.data.sidecars import CACHE_VARIABLE

pytestmark = pytest.mark.integration

TOOL = Path(__file__).parents[2] / "tools/index_dataset.py"
NUM_TARS = 12


@pytest.mark.slow
def test_what_was_indexed_before_an_interruption_is_not_indexed_again(bucket, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for number in range(NUM_TARS):
        write_shard(tmp_path / f"data/{number:02}.tar", 3, first=3 * number)
    url = bucket.upload(tmp_path / "data", "set/")
    indexes = f"{bucket.url}/indexes"
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        command = [sys.executable, str(TOOL), url, "--workers", "1", "--cache", indexes]
        tool = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        while not (done := len(written(bucket))):
            assert tool.poll() is None
            time.sleep(0.01)
        tool.kill()
        assert f"{NUM_TARS} tars, " in tool.communicate(timeout=10)[0], "its worker has ended with it"
        done = len(written(bucket))
        assert 0 < done < NUM_TARS

        monkeypatch.setenv(CACHE_VARIABLE, "")  # to be restored
        main([url, "--workers", "2", "--cache", indexes])
        told = capsys.readouterr().out
        assert f"; {NUM_TARS - done} to index" in told
        assert f"export {CACHE_VARIABLE}={indexes}" in told
        assert os.environ[CACHE_VARIABLE] == indexes
        assert len(written(bucket)) == NUM_TARS
        assert any(key.startswith("indexes/") and key.endswith(MANIFEST_NAME) for key in bucket.list_keys())
        proxy.gets.clear()
        assert catalog_of(url).num_rows == 3 * NUM_TARS
        assert not any(path.endswith((".tar", INDEX_SUFFIX)) for path, number in proxy.gets.items() if number)


def written(bucket):
    return [key for key in bucket.list_keys() if key.endswith(INDEX_SUFFIX)]
