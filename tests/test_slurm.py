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
from safetensors.torch import load

from tests.many_processes import launch_processes
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.slurm_cluster import job, slurm, slurm_cluster, wait_until, why_not
from tests.warpcore.runs import TINY, load_weights, numbers, read_metrics, tiny_settings, write_shard
from tools.build_dataset import build_dataset
from tools.make_demo_dataset import make_demo_dataset
from train.train_c import TrainStageC
from warpcore.config import make_config

pytestmark = pytest.mark.slow

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
    """Submits example_train.sh for a run of a script on two nodes; gives the job's number."""

    def submit(script: Path, settings: dict, *options: str) -> str:
        endpoint = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "XDG_"))}
        environment = cluster[1] | endpoint | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings | {"experiment_id": "overridden"}))
        submitted = subprocess.run(
            ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1",
             f"--output={tmp_path}/log.txt", *options, str(REPOSITORY / "example_train.sh"), str(script), str(config),
             "experiment_id=run_%a"),
            env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return submitted.stdout.strip()

    return submit


def quickstart(folder: Path, data: Path) -> dict:
    """The settings of the README's first run, of the mini Stage C, but for a few updates only."""
    settings = yaml.safe_load((REPOSITORY / "configs/training/quickstart_c.yaml").read_text())
    return settings | {
        "experiment_id": "run_0", "checkpoint_path": str(folder), "webdataset_path": str(data), "device": "cpu",
        "updates": 40, "batch_size": 4, "warmup_updates": 5, "save_every": 25, "log_every": 1, "ema_start_iters": 5,
        "validation_samples": 4, "sample_count": 2, "sample_steps": 4,
    }  # fmt: skip


def at_update(folder: Path, update: int):
    return lambda: (lines := read_metrics_in(folder)) and lines[-1]["update"] >= update


def read_metrics_in(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def test_stage_c_on_two_nodes_is_signalled_goes_back_into_the_queue_and_nothing_is_lost(
    cluster, run, bucket, tmp_path
):
    folder, environment = cluster
    make_demo_dataset(tmp_path / "pictures", 36)
    build_dataset(tmp_path / "pictures", tmp_path / "data", samples_per_shard=12)
    settings = quickstart(tmp_path / "whole", tmp_path / "data")
    on_s3 = {
        "webdataset_path": bucket.upload(tmp_path / "data", "data/"),
        "checkpoint_path": f"{bucket.url}/runs",
        "scratch_path": str(tmp_path / "scratch"),
    }
    written = tmp_path / "scratch" / bucket.name / "runs" / "run_0"
    number = run(REPOSITORY / "train/train_c.py", settings | on_s3)
    wait_until(at_update(written, 5), 240, folder)
    slurm(environment, "scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: job(environment, number)["JobState"] in ("COMPLETED", "FAILED"), 240, folder)
    ended, log = job(environment, number), (tmp_path / "log.txt").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "before the run stops" in log
    assert "Traceback" not in log
    assert "see if it is gone" not in log  # the job knows its own lease

    def sent(name: str) -> bytes:
        return bucket.client.get_object(Bucket=bucket.name, Key=f"runs/run_0/{name}")["Body"].read()

    launch_processes(2, _train, settings)
    assert numbers(map(json.loads, sent("metrics.jsonl").splitlines())) == numbers(read_metrics(settings))
    for name in ("generator", "generator_ema"):
        expected = load_weights(settings, name)
        assert all((tensor == expected[key]).all() for key, tensor in load(sent(f"{name}.safetensors")).items())
    assert sent("samples/00000040.png")


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster, run, tmp_path):
    folder, environment = cluster
    settings = tiny_settings(
        tmp_path / "runs", write_shard(tmp_path / "a.tar", 30), batch_size=8, updates=100_000, save_every=50
    )
    number = run(TINY, settings, "--array=5")
    written = tmp_path / "runs" / "run_5"
    wait_until(at_update(written, 5), 120, folder)
    slurm(environment, "scancel", number)
    wait_until(lambda: job(environment, number)["JobState"] == "CANCELLED", 60, folder)
    assert job(environment, number)["Restarts"] == "0"
    update = read_metrics_in(written)[-1]["update"]
    assert (written / "state" / f"{update:08d}").exists(), (tmp_path / "log.txt").read_text()


def _train(settings: dict) -> None:
    assert TrainStageC(make_config(TrainStageC.Config, settings)).run() == 0
