"""Of runs that want to write below one prefix of S3, one does."""

import time

import pytest

from tests.faulty_proxy import FaultyProxy
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.s3_server import talk_to
from tests.warpcore.runs import tiny_settings, write_shard
from tests.warpcore.test_checkpoint import ALONE, save
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore import lease
from warpcore.checkpoint import Checkpoints
from warpcore.config import make_config
from warpcore.data import s3_requests
from warpcore.data.s3_files import put_if, remove
from warpcore.lease import Lease, LeaseError

pytestmark = pytest.mark.integration


@pytest.fixture
def remote(bucket, tmp_path) -> dict:
    """The settings of a run on S3."""
    place = {"checkpoint_path": f"{bucket.url}/runs", "scratch_path": str(tmp_path / "scratch")}
    return tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 10), updates=2) | place


def train(settings: dict) -> int:
    return Denoiser(make_config(TinyConfig, settings)).run()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)


@pytest.mark.integration
def test_of_two_runs_with_one_experiment_id_the_second_refuses(bucket, remote, tmp_path, quick, caplog):
    first = Lease(f"{bucket.url}/runs/tiny/lease.json", "the first")
    first.take()
    with pytest.raises(
        LeaseError, match=r"runs/tiny is being written by another run \(process \d+ on .*\): stop it, or"
    ):
        train(remote)
    assert "see if it is gone" in caplog.text
    first.check()
    first.release()
    assert train(remote) == 0
    assert "runs/tiny/lease.json" not in bucket.list_keys()


@pytest.mark.integration
def test_a_run_that_is_gone_is_waited_for_until_its_lease_runs_out(bucket, remote, quick, monkeypatch):
    gone = Lease(f"{bucket.url}/runs/tiny/lease.json", "gone")
    gone._write(None)  # and never again
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1)
    assert train(remote) == 0


def test_a_slurm_job_out_of_the_queue_takes_its_lease_over_and_the_process_before_stops(bucket, quick, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    before = Lease(f"{bucket.url}/runs/tiny/lease.json", "the one before")
    before.take()
    with pytest.raises(LeaseError, match="a second launch in the same step is being written by another run"):
        Lease(before.url, "a second launch in the same step").take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    later = Lease(f"{bucket.url}/runs/tiny/lease.json", "the one that came back")
    later.take()
    with pytest.raises(LeaseError, match="another run took the one before over"):
        before.renew()
    before.release()
    later.renew()
    later.release()


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"null", b'{"owner": 1, "token": "a", "who": "b"}'])
def test_a_lease_that_cannot_be_read_runs_out_as_any_other_does(bucket, quick, monkeypatch, content):
    held = Lease(f"{bucket.url}/lease.json", "held")
    held.take()
    remove([held.url])
    put_if(held.url, content, None)
    with pytest.raises(LeaseError, match="another run took held over"):
        held.renew()
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1)
    after = Lease(held.url, "after")
    after.take()
    after.release()
    held.release()


@pytest.mark.parametrize("conditions", ["known", "ignored", "not implemented"])
def test_a_lease_works_with_endpoints_that_know_conditions_and_others(bucket, quick, monkeypatch, conditions):
    names = ("if-match", "if-none-match")
    how = {"known": {}, "ignored": {"ignored": names}, "not implemented": {"not_implemented": names}}[conditions]
    with FaultyProxy(bucket.endpoint, **how) as proxy:
        talk_to(proxy.url, monkeypatch)
        leases = [Lease(f"{bucket.url}/lease.json", name) for name in "ab"]
        leases[0].take()
        leases[0].renew()
        with pytest.raises(LeaseError, match="b is being written"):
            leases[1].take()
        leases[0].release()
        leases[1].take()
        leases[1].release()


def test_a_lease_is_held_though_no_answer_to_its_writing_arrives(bucket, quick, monkeypatch):
    """What was written is answered with 503; asked again, S3 refuses to write it twice, and half of that is lost."""

    def spoil_the_first(method: str, path: str) -> None:
        proxy.share = float(method == "PUT" and proxy.met.total() < 2)

    with FaultyProxy(bucket.endpoint, faults=("wrong length",)) as proxy:
        talk_to(proxy.url, monkeypatch)
        held = Lease(f"{bucket.url}/lease.json", "held")
        held.take()
        proxy.on_request = spoil_the_first
        held.renew()
        held.release()
    assert proxy.met["wrong length"] == 2


@pytest.mark.parametrize("outage", ["503", "no answer to PUT", "connection refused"])
def test_a_lease_is_renewed_again_when_s3_is_back(bucket, quick, monkeypatch, caplog, outage):
    monkeypatch.setattr(s3_requests, "CALL_ATTEMPTS", 1)
    monkeypatch.setattr(s3_requests, "CALL_SECONDS", 0.3)
    stalled = []

    def stall(method: str, path: str) -> None:
        if stalled and method == "PUT":
            time.sleep(1.5)  # boto3 waits a second for leave to send a body, and does so without it then

    with FaultyProxy(bucket.endpoint, faults=("503",), on_request=stall) as proxy:
        talk_to(proxy.url, monkeypatch)
        held, other = (Lease(f"{bucket.url}/lease.json", name) for name in ("held", "other"))
        held.take()
        if outage == "503":
            proxy.share = 1.0
        elif outage == "no answer to PUT":
            stalled.append(True)
        else:
            talk_to("http://127.0.0.1:1", monkeypatch)
        while "held: the lease can't be renewed" not in caplog.text:
            assert held._thread.is_alive()
            time.sleep(0.05)
        proxy.share = 0.0
        stalled.clear()
        monkeypatch.setattr(s3_requests, "CALL_ATTEMPTS", 6)
        monkeypatch.setattr(s3_requests, "CALL_SECONDS", 20)  # whatever else this machine does: the outage is over
        talk_to(proxy.url, monkeypatch)
        with pytest.raises(LeaseError, match="other is being written"):  # that is, it sees it being renewed
            other.take()
        held.check()
        held.release()


def test_a_lease_that_can_not_be_removed_at_the_end_is_told_and_no_error(bucket, tmp_path, monkeypatch, caplog):
    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        checkpoints = Checkpoints(tmp_path / "run", ALONE, url=f"{bucket.url}/run")
        save(checkpoints, 4)
        proxy.refused = ("DELETE",)
        checkpoints.close()
    assert "the lease stays" in caplog.text
