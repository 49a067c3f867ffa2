"""`profile: true` leaves a trace that shows what an update does."""

import gzip
import json

import pytest

from tests.warpcore.runs import tiny_settings, train_here, write_shard

pytestmark = pytest.mark.integration


def test_a_trace_of_the_updates_is_written(tmp_path):
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 8), updates=8, profile=True)
    status, lines = train_here(settings)
    assert (status, len(lines)) == (0, 8)
    trace = json.loads(gzip.decompress((tmp_path / "tiny" / "profile" / "trace.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert names.count("aten::convolution_backward") == 2 * 3  # two layers, three updates
    assert any(event["name"] == "[memory]" for event in trace["traceEvents"])


def test_without_the_key_there_is_none(tmp_path):
    train_here(tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 8), updates=2))
    assert not (tmp_path / "tiny" / "profile").exists()
