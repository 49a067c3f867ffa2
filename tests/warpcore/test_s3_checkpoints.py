"""A run that writes to S3 is the run that writes to a folder, and what is whole on S3 stays whole."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import chaos
from benchmarks.chaos import settings_of, write_data
from benchmarks.disturbed_runs import Difference, Started, read_metrics, train
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.many_processes import launch_processes
from tests.s3_server import Bucket, talk_to
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.tiers import represented_by
from tests.warpcore.runs import load_weights, numbers, tiny_settings, train_here, write_shard
from tests.warpcore.test_checkpoint import ALONE, save
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.checkpoint import CheckpointError, Checkpoints
from warpcore.config import ConfigError, make_config
from warpcore.data import s3_requests
from warpcore.errors import UserError
from warpcore.lease import Lease
from warpcore.processes import Processes
from warpcore.s3_place import S3Place

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 10)


@pytest.fixture(scope="module")
def local(shard, tmp_path_factory) -> dict:
    """The settings of a run that was made in a folder."""
    settings = tiny_settings(tmp_path_factory.mktemp("local"), shard, validation_samples=3, backup_every=8)
    train_here(settings)
    return settings


@pytest.fixture
def remote(bucket, local, tmp_path) -> dict:
    """The settings of the same run on S3."""
    return local | {"checkpoint_path": f"{bucket.url}/runs", "scratch_path": str(tmp_path / "scratch")}


def train_remote(settings: dict) -> int:
    return Denoiser(make_config(TinyConfig, settings)).run()


def get(bucket: Bucket, name: str) -> bytes:
    return bucket.client.get_object(Bucket=bucket.name, Key=f"runs/tiny/{name}")["Body"].read()


def metrics(bucket: Bucket) -> list[tuple]:
    return numbers([json.loads(line) for line in get(bucket, "metrics.jsonl").splitlines()])


def metrics_of(settings: dict) -> list[tuple]:
    return numbers(read_metrics(settings))


@pytest.mark.bits
def test_what_a_run_writes_is_on_s3_and_is_what_a_run_in_a_folder_writes(bucket, local, remote, tmp_path):
    train_remote(remote)
    folder = Path(local["checkpoint_path"]) / "tiny"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".lock"}
    assert {key.removeprefix("runs/tiny/") for key in bucket.list_keys()} == written
    assert any(name.startswith("samples/") for name in written)
    scratch = make_config(TinyConfig, remote).run_folder
    assert not (scratch / "state").exists()
    train_remote(remote)  # there is nothing to do, but it looks
    assert not (scratch / "state").exists()
    assert metrics(bucket) == metrics_of(local)
    for name in ("generator", "generator_ema", "backups/00000008/generator"):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(get(bucket, f"{name}.safetensors"))
        expected = load_weights(local, name)
        assert all((tensor == expected[key]).all() for key, tensor in load_file(path).items())


@pytest.mark.bits
def test_a_run_goes_on_from_s3_on_a_machine_that_has_nothing(bucket, local, remote, tmp_path):
    train_remote(remote | {"updates": 8})
    shutil.rmtree(tmp_path / "scratch")
    bucket.put("runs/tiny/state/00000010/__0_0.distcp", b"of a process that was killed")
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="runs/tiny/generator.safetensors")
    train_remote(remote)
    assert metrics(bucket) == metrics_of(local)
    assert not [key for key in bucket.list_keys() if "00000010" in key]
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


@pytest.mark.slow
@pytest.mark.bits
def test_faults_of_the_network_change_nothing(bucket, local, remote, monkeypatch):
    faults = tuple(fault for fault in FAULTS if fault != "trickle")  # boto3 would wait for what is so small
    with FaultyProxy(bucket.endpoint, share=0.2, faults=faults) as proxy:
        talk_to(proxy.url, monkeypatch)
        train_remote(remote | {"updates": 8})
        train_remote(remote)
    assert set(proxy.met) == set(faults)
    assert metrics(bucket) == metrics_of(local)
    talk_to(bucket.endpoint, monkeypatch)
    assert train_remote(remote | {"updates": 13}) == 0  # from a checkpoint that was whole


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """Settings of a run in processes of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = settings_of(folder, write_data(folder / "data", 60), updates=12, use_fsdp=True)
    train(settings, 1)
    return settings


@pytest.fixture
def environment(bucket) -> dict[str, str]:
    """What processes need to find the bucket, as steps of one Slurm job."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {"SLURM_JOB_ID": "7"}


@pytest.mark.bits
@pytest.mark.parametrize(
    "name",
    represented_by("__0_0.distcp", of=("__0_0.distcp", "generator.safetensors", "manifest.json")),
)
def test_a_run_killed_while_it_sends_a_file_goes_on_from_what_is_whole(
    bucket, undisturbed, environment, tmp_path, name
):
    settings = undisturbed | {"checkpoint_path": f"{bucket.url}/runs", "scratch_path": str(tmp_path)}
    sent = []

    def kill_at_the_second(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(name):
            sent.append(path)
            if len(sent) == 2:
                started.send(0, signal.SIGKILL)

    with FaultyProxy(bucket.endpoint, on_request=kill_at_the_second) as proxy:
        started = Started(settings, 1, environment | {"AWS_ENDPOINT_URL": proxy.url})
        assert started.finish(60) == [-signal.SIGKILL], started.log.read_text()
    train(settings, 1, environment | {"SLURM_RESTART_COUNT": "1"})
    assert Difference.between(settings, undisturbed) == Difference(0, 0.0, 0.0, 0.0)
    lines = bucket.client.get_object(Bucket=bucket.name, Key="runs/run/metrics.jsonl")["Body"].read().splitlines()
    assert numbers(map(json.loads, lines)) == numbers(read_metrics(undisturbed))
    assert {key.split("/")[3] for key in bucket.list_keys() if "/state/" in key} == {"00000008", "00000012"}
    assert "damaged" not in started.log.read_text()


@pytest.mark.slow
def test_machines_that_share_no_folder_meet_on_s3(bucket, undisturbed, environment, tmp_path):
    settings = undisturbed | {"checkpoint_path": f"{bucket.url}/runs"}
    for updates, count, places in ((4, 2, "ab"), (8, 4, "abab"), (12, 2, "cd")):
        machines = [str(tmp_path / place) for place in places]
        launch_processes(count, _train_on_machine, settings | {"updates": updates}, environment, machines)
    # Of four processes' shards a machine fetches its half, and the first, which has what is not sharded.
    assert (tmp_path / "c" / "fetched").read_text() == "__0_0.distcp __1_0.distcp"
    assert (tmp_path / "d" / "fetched").read_text() == "__0_0.distcp __2_0.distcp __3_0.distcp"
    assert not list(tmp_path.rglob("state"))  # nor on the machines of processes that are not the main one
    main = settings | {"scratch_path": str(tmp_path / "c" / "warpcore" / "runs")}
    found = Difference.between(main, undisturbed)
    assert found.wrong_samples == 0
    assert max(found.early_loss, found.weights) < 1e-5


def _train_on_machine(settings: dict, environment: dict[str, str], machines: list[str]) -> None:
    os.environ |= environment | {"XDG_CACHE_HOME": machines[int(os.environ["RANK"])]}
    assert _Listing(make_config(chaos.Denoiser.Config, settings)).run() == 0


class _Listing(chaos.Denoiser):
    """Writes down what of a checkpoint its machine holds once the run goes on."""

    def setup(self):
        super().setup()
        names = sorted(path.name for path in self.config.run_folder.glob("state/*/*.distcp"))
        (Path(os.environ["XDG_CACHE_HOME"]) / "fetched").write_text(" ".join(names))


@pytest.mark.parametrize(("damage", "told"), [("flip", "is not what was written"), ("cut", "bytes instead of"),
                                              ("remove", "is missing")])  # fmt: skip
def test_a_damaged_checkpoint_on_s3_is_passed_over(bucket, local, remote, caplog, damage, told):
    train_remote(remote | {"updates": 8})
    key = "runs/tiny/state/00000008/__0_0.distcp"
    content = bytearray(get(bucket, "state/00000008/__0_0.distcp"))
    content[len(content) // 2] ^= 0x10
    if damage == "remove":
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    else:
        bucket.put(key, bytes(content[: -1 if damage == "cut" else None]))
    train_remote(remote)
    assert "update 8 is damaged (__0_0.distcp " in caplog.text
    assert told in caplog.text
    assert "goes on from update 4" in caplog.text
    assert metrics(bucket) == metrics_of(local)


@pytest.mark.integration
def test_a_manifest_on_s3_that_names_a_path_is_damage_and_that_file_stays_as_it_is(bucket, remote, caplog, tmp_path):
    train_remote(remote | {"updates": 8})
    victim = tmp_path / "victim"
    victim.write_text("mine")
    manifest = json.loads(get(bucket, "state/00000008/manifest.json"))
    manifest["files"][str(victim)] = {"bytes": 0, "sha256": "0"}
    bucket.put("runs/tiny/state/00000008/manifest.json", json.dumps(manifest).encode())
    bucket.put(f"runs/tiny/state/00000008/{victim}", b"")
    train_remote(remote | {"updates": 9})
    assert victim.read_text() == "mine"
    assert "update 8 is damaged (manifest.json lists" in caplog.text


def test_a_place_that_can_not_be_written_is_named(bucket, remote, monkeypatch):
    class NoRightsAnyMore(Denoiser):
        def loss(self, clean, random):
            if self.update == 6:
                self.checkpoints.wait()  # for what is still being sent of update 4
                proxy.refused = ("PUT",)
            return super().loss(clean, random)

    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        with pytest.raises(CheckpointError, match=r"could not save update 8 in s3://.*(?s:.*)update 4 is whole"):
            NoRightsAnyMore(make_config(TinyConfig, remote)).run()


def test_a_run_that_lost_its_place_is_told_so_and_nothing_of_disks(bucket, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", ALONE, url=f"{bucket.url}/run")
    save(checkpoints, 4)
    bucket.client.delete_object(Bucket=bucket.name, Key="run/lease.json")
    other = Lease(f"{bucket.url}/run/lease.json", "the other")
    other.take()
    with pytest.raises(
        CheckpointError, match=r"update 8 in s3://.*run: another run took s3.*over: .*\n.*4 is whole"
    ) as e:
        save(checkpoints, 8)
    assert "disk" not in str(e.value)
    checkpoints.close()
    other.release()


@pytest.mark.slow
def test_a_scratch_folder_that_can_not_be_written_is_no_damage(bucket, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", ALONE, url=f"{bucket.url}/run")
    save(checkpoints, 4)
    in_the_way = tmp_path / "run" / "state" / "00000004" / "__0_0.distcp.partial"
    in_the_way.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="scratch_path: cannot write to"):
        checkpoints.newest()
    in_the_way.rmdir()
    assert checkpoints.newest() == 4
    with pytest.raises(CheckpointError, match=r"s3://.*/run \(by way of .*run \(scratch_path\)\) is being written by"):
        Checkpoints(tmp_path / "run", ALONE, url=f"{bucket.url}/run")
    checkpoints.close()


class _Threads(Processes):
    """Processes that wait for each other no more than they promise: for an answer of the main one, for it alone."""

    def __init__(self, rank: int, values: list, all_there: Barrier, answered: Event):
        super().__init__(rank, len(values), torch.device("cpu"))
        vars(self).update(values=values, all_there=all_there, answered=answered)

    def gather(self, value):
        self.values[self.rank] = value
        self.all_there.wait()
        return list(self.values)

    def on_main(self, make):
        if self.is_main:
            make()
            self.answered.set()
        assert self.answered.wait(60)


@pytest.mark.slow
def test_an_old_scratch_folder_is_empty_before_any_process_of_its_machine_goes_on(bucket, tmp_path, monkeypatch):
    (tmp_path / "b" / "state" / "00000004").mkdir(parents=True)
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (time.sleep(0.5), remove(path)))
    values, all_there, answered = [None] * 3, Barrier(3), Event()

    def is_empty(rank: int, machine: str) -> bool:
        place = S3Place(tmp_path / machine, f"{bucket.url}/run")
        place.join(_Threads(rank, values, all_there, answered))
        return not (place.folder / "state").exists()

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(is_empty, range(3), "abb"))


def test_a_file_that_vanishes_while_it_is_sent_is_passed_over(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_requests, "PATIENCE_SECONDS", 1)
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder, ALONE, url=f"{bucket.url}/run")
    for name in "abc":
        (folder / name).write_text(name)

    def vanish(method: str, path: str) -> None:  # at the first request, which looks for the bucket
        (folder / "a").unlink(missing_ok=True)

    with FaultyProxy(bucket.endpoint, on_request=vanish) as proxy:
        talk_to(proxy.url, monkeypatch)
        checkpoints.close()
    assert bucket.list_keys() == ["run/b", "run/c"]


def test_an_older_checkpoint_on_s3_that_can_not_be_removed_stays_and_the_save_is_whole(
    bucket, tmp_path, monkeypatch, caplog
):
    def updates() -> list[str]:
        return sorted({key.split("/")[2] for key in bucket.list_keys() if "/state/" in key})

    with FaultyProxy(bucket.endpoint) as proxy:
        talk_to(proxy.url, monkeypatch)
        checkpoints = Checkpoints(tmp_path / "run", ALONE, keep_last=1, url=f"{bucket.url}/run")
        save(checkpoints, 4)
        proxy.refused = ("DELETE",)
        save(checkpoints, 8)
        assert "older checkpoints stay" in caplog.text
        assert checkpoints.newest() == 8
        assert updates() == ["00000004", "00000008"]
        proxy.refused = ()
        save(checkpoints, 12)
        assert updates() == ["00000012"]
        checkpoints.close()


@pytest.mark.parametrize("url", ["s3://", "s3:/bucket/x", "s3:///x"])
def test_an_url_that_is_none_is_refused(remote, url):
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        make_config(TinyConfig, remote | {"checkpoint_path": url})


def test_snapshots_of_averages_are_on_s3_alone_and_others_beside_them_are_refused(bucket, remote):
    given = remote | {"updates": 4, "save_every": 2, "validation_samples": 0, "backup_every": None}
    train_remote(given | {"updates": 2, "post_hoc_ema": {"every": 2}})
    kept = {f"runs/tiny/post_hoc/00000002/{sigma}/generator.safetensors" for sigma in (0.05, 0.1)}
    assert kept <= set(bucket.list_keys())
    assert not list(Path(remote["scratch_path"]).rglob("post_hoc/*/*/*"))
    with pytest.raises(UserError, match=r"sigma_rel 0\.2 begin with this start.*/post_hoc has snapshots of earlier"):
        train_remote(given | {"post_hoc_ema": {"every": 2, "sigma_rel": [0.05, 0.2]}})


def test_a_snapshot_that_is_begun_while_files_are_sent_stays(bucket, tmp_path):
    folder = tmp_path / "scratch" / "post_hoc"
    whole, begun, next_one = (
        folder / name for name in ("00000002/0.1/a.safetensors", "00000004/0.1/a.partial", "6/0.1")
    )
    for path in (whole.parent, begun.parent, next_one):
        path.mkdir(parents=True)
    whole.touch()
    begun.touch()
    place = S3Place(tmp_path / "scratch", f"{bucket.url}/runs")
    place.take()
    try:
        place.bring_files()
    finally:
        place.leave()
    assert f"runs/post_hoc/{whole.relative_to(folder)}" in bucket.list_keys()
    assert not whole.exists()
    assert begun.exists()
    assert next_one.is_dir()


def test_a_folder_that_is_removed_while_files_are_sent_is_passed_over(bucket, tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    for name in ("state/00000004.partial", "samples"):
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    place = S3Place(folder, f"{bucket.url}/runs")
    place.take()
    list_folder = os.scandir

    def removed_meanwhile(path="."):
        if Path(path) != folder and Path(path).is_relative_to(folder):
            Path(path).rename(tmp_path / f"removed {Path(path).name}")
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", removed_meanwhile)
    try:
        place.bring_files()
    finally:
        place.leave()
    assert "runs/metrics.jsonl" in bucket.list_keys()
