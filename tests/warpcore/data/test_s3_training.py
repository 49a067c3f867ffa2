"""A run from S3 is the run from a folder, whatever the network does, or it stops with an error."""

import pytest

from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from tests.warpcore.runs import numbers, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser
from warpcore.data import s3_requests
from warpcore.data.storage_protocol import ChangedShardError
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"data/{number}.tar", 10, first=10 * number)
    return tmp_path / "data"


@pytest.mark.bits
def test_a_run_through_faults_has_the_samples_and_losses_of_the_run_from_the_folder(
    bucket, data, tmp_path, monkeypatch
):
    url = bucket.upload(data, "set/")
    monkeypatch.setattr(s3_requests, "REQUEST_SECONDS", 0.3)
    _, local = train_here(tiny_settings(tmp_path / "local", data))
    with FaultyProxy(bucket.endpoint, share=0.2) as proxy:
        talk_to(proxy.url, monkeypatch)
        _, remote = train_here(tiny_settings(tmp_path / "remote", url))
    assert set(proxy.met) == set(FAULTS)
    assert numbers(remote) == numbers(local)
    assert all(line["samples_hash"] for line in local)


@pytest.mark.slow
@pytest.mark.bits
def test_workers_read_from_s3_too_and_the_next_run_from_the_cache(bucket, data, tmp_path, monkeypatch):
    url = bucket.upload(data, "set/")
    _, local = train_here(tiny_settings(tmp_path / "local", data))
    cached = {"cache_path": str(tmp_path / "cache"), "cache_size_gb": 0.1}
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        _, remote = train_here(tiny_settings(tmp_path / "remote", url, num_workers=1, **cached))
        assert numbers(remote) == numbers(local)
        tars = [f"/{bucket.name}/set/{number}.tar" for number in range(3)]
        before = [proxy.gets[tar] for tar in tars]
        assert all(before)
        _, again = train_here(tiny_settings(tmp_path / "again", url, **cached))
        assert numbers(again) == numbers(local)
        assert [proxy.gets[tar] for tar in tars] == before


def test_a_tar_that_is_swapped_stops_the_run_and_the_next_start_names_it(bucket, data, tmp_path):
    url = bucket.upload(data, "set/")

    class Swapped(Denoiser):
        def encode(self, batch, random):
            if batch.number == 6:
                for number in range(3):
                    bucket.put(f"set/{number}.tar", write_shard(tmp_path / "other.tar", 10, first=90).read_bytes())
            return super().encode(batch, random)

    with pytest.raises(ChangedShardError, match=r"set/\d\.tar changed while it was in use"):
        train_here(tiny_settings(tmp_path, url), use_case=Swapped)
    with pytest.raises(UserError, match=r"the data is not what the checkpoint was made with: .*\d\.tar changed"):
        train_here(tiny_settings(tmp_path, url))
