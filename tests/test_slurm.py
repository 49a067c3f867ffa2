"""A run on a real Slurm, from S3 and to S3: two nodes, a signal, back into the queue, and in the end as if nothing had
happened."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.many_processes import launch_processes
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.slurm_cluster import job, slurm, slurm_cluster, wait_until, why_not
from tests.warpcore.runs import TINY, numbers, read_metrics, tiny_settings, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import make_config

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # pytest's own folders make paths that are too long for sockets
    try:
        with slurm_cluster(folder) as environment:
            yield folder, environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(cluster, tmp_path):
    """Submits example_train.sh for a run on two nodes; gives the job's number."""

    def submit(settings: dict, *options: str) -> str:
        endpoint = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "XDG_"))}
        environment = cluster[1] | endpoint | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings | {"experiment_id": "overridden"}))
        submitted = subprocess.run(
            ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
             f"--output={tmp_path}/log.txt", *options, str(REPOSITORY / "example_train.sh"), str(TINY), str(config),
             "experiment_id=run_%a"),
            env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return submitted.stdout.strip()

    return submit


def settings_of(folder: Path, data: Path | str, **changes) -> dict:
    return tiny_settings(folder, data, batch_size=8, micro_batch_size=2, save_every=50) | changes


def at_update(folder: Path, update: int):
    return lambda: (lines := read_metrics_in(folder)) and lines[-1]["update"] >= update


def read_metrics_in(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def test_a_job_that_is_signalled_goes_back_into_the_queue_and_nothing_is_lost(cluster, run, bucket, tmp_path):
    folder, environment = cluster
    for number in range(3):
        write_shard(tmp_path / f"data/{number}.tar", 10, first=10 * number)
    url = bucket.upload(tmp_path / "data", "data/")
    settings = settings_of(tmp_path / "whole", tmp_path / "data", experiment_id="run_0", updates=300)
    on_s3 = {
        "webdataset_path": url,
        "checkpoint_path": f"{bucket.url}/runs",
        "scratch_path": str(tmp_path / "scratch"),
    }
    written = tmp_path / "scratch" / bucket.name / "runs" / "run_0"
    number = run(settings | on_s3)
    wait_until(at_update(written, 20), 120, folder)
    slurm(environment, "scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: job(environment, number)["JobState"] in ("COMPLETED", "FAILED"), 180, folder)
    ended = job(environment, number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "log.txt").read_text()
    launch_processes(2, _train, settings)
    found = bucket.client.get_object(Bucket=bucket.name, Key="runs/run_0/metrics.jsonl")["Body"].read()
    assert numbers([json.loads(line) for line in found.splitlines()]) == numbers(read_metrics(settings))
    assert "see if it is gone" not in (tmp_path / "log.txt").read_text()


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster, run, tmp_path):
    folder, environment = cluster
    data = write_shard(tmp_path / "a.tar", 30)
    number = run(settings_of(tmp_path / "runs", data, updates=100_000), "--array=5")
    written = tmp_path / "runs" / "run_5"
    wait_until(at_update(written, 5), 120, folder)
    slurm(environment, "scancel", number)
    wait_until(lambda: job(environment, number)["JobState"] == "CANCELLED", 60, folder)
    assert job(environment, number)["Restarts"] == "0"
    update = read_metrics_in(written)[-1]["update"]
    assert (written / "state" / f"{update:08d}").exists(), (tmp_path / "log.txt").read_text()


def _train(settings: dict) -> None:
    assert Denoiser(make_config(TinyConfig, settings)).run() == 0
