"""A run on a real Slurm: two nodes, a signal, back into the queue, and in the end as if nothing had happened."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.many_processes import launch_processes
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
    """Submits example_train.sh for a run on two nodes; gives its settings and the job's number."""
    environment = cluster[1] | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    data = write_shard(tmp_path / "a.tar", 30)

    def submit(experiment: str, updates: int, *options: str) -> tuple[dict, str]:
        settings = tiny_settings(
            tmp_path / "runs", data, experiment_id=experiment, batch_size=8, micro_batch_size=2, updates=updates,
            save_every=50,
        )  # fmt: skip
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings | {"experiment_id": "overridden"}))
        submitted = subprocess.run(
            ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
             f"--output={tmp_path}/log.txt", *options, str(REPOSITORY / "example_train.sh"), str(TINY), str(config),
             "experiment_id=run_%a"),
            env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return settings, submitted.stdout.strip()

    return submit


def at_update(settings: dict, update: int):
    return lambda: (lines := read_metrics(settings)) and lines[-1]["update"] >= update


def test_a_job_that_is_signalled_goes_back_into_the_queue_and_nothing_is_lost(cluster, run, tmp_path):
    folder, environment = cluster
    settings, number = run("run_0", 300)
    wait_until(at_update(settings, 20), 120, folder)
    slurm(environment, "scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: job(environment, number)["JobState"] in ("COMPLETED", "FAILED"), 180, folder)
    ended = job(environment, number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "log.txt").read_text()
    whole = settings | {"checkpoint_path": str(tmp_path / "whole")}
    launch_processes(2, _train, whole)
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster, run, tmp_path):
    folder, environment = cluster
    settings, number = run("run_5", 100_000, "--array=5")
    wait_until(at_update(settings, 5), 120, folder)
    slurm(environment, "scancel", number)
    wait_until(lambda: job(environment, number)["JobState"] == "CANCELLED", 60, folder)
    assert job(environment, number)["Restarts"] == "0"
    update = read_metrics(settings)[-1]["update"]
    assert (tmp_path / "runs" / "run_5" / "state" / f"{update:08d}").exists(), (tmp_path / "log.txt").read_text()


def _train(settings: dict) -> None:
    assert Denoiser(make_config(TinyConfig, settings)).run() == 0
