"""Training scripts whose processes are killed, whose disk is full, whose S3 fails: do they see the same samples?

    python3 benchmarks/chaos_scripts.py train_c train_sd [--kills 50] [--full-disks 5] [--faults 0.2] [--seed 0]
    python3 benchmarks/chaos_scripts.py train_latte --mixed --kills 50

Each script trains its mini on a CPU, undisturbed on one process first. Then the same run is killed again and again, at
random moments, one of its processes each time, and started on 1, 2 or 4; on some starts no file can grow beyond 256
KiB, as where the disk is full. With --faults, data and checkpoints lie on an S3 on this machine, behind a proxy that
treats this share of the requests badly. --mixed trains on clips and pictures, in micro-batches of unequal sizes. Each
update must have seen the same samples in the end; losses and weights are compared.
"""

import argparse
import logging
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.data import photographs
from benchmarks.disturbed_runs import COUNTS, Difference, disturb, folder_of, preload, train
from benchmarks.gpu_part import Bench
from benchmarks.gpu_scripts import SCRIPTS, clips, pictures, script_settings, use_case

sys.path.append(str(Path(__file__).parents[1]))  # the proxy is one of the tests' servers
from tests.faulty_proxy import FaultyProxy
from tools.make_demo_dataset import make_demo_dataset

UPDATES_PER_TROUBLE = 3
SAMPLES = 24
MIXED = {
    "bucket_config": {"64px": {1: [1.0, 3], 5: [1.0, 2], 9: [0.6, 1], 13: [0.4, 1]}}, "micro_batches_per_update": 4,
    "frame_stride": 1,
}  # fmt: skip
"""Pictures and clips of three lengths, of 1 + 4 n frames as an AutoencoderKLWan takes them, each 24 frames or more."""
KEY, SECRET = "benchmark-key", "benchmark-secret"


def mixed_data(bench: Bench) -> Path:
    """A tar of clips and pictures, each with a class."""
    path = bench.scratch / "mixed.tar"
    folder = bench.scratch / "mixed"
    make_demo_dataset(folder, SAMPLES, video=True)
    for number, content in enumerate(photographs(SAMPLES // 2, 64**2, 1.5 * 64**2)):
        (folder / f"p{number}.jpg").write_bytes(content)
        (folder / f"p{number}.txt").write_text("a photograph", encoding="utf-8")
        (folder / f"p{number}.cls").write_text(str(number % 7), encoding="utf-8")
    with tarfile.open(path, "w") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(file, file.relative_to(folder).as_posix())
    return path


def settings_of(bench: Bench, name: str, troubles: int, mixed: bool, patience: float) -> dict:
    """Of a run of a script that is killed or meets a full disk so often. Its processes wait for each other for half of
    the patience, as one may send a checkpoint through a proxy that fails while the other is done."""
    kind = use_case(name)
    if mixed:
        data, size = mixed_data(bench), MIXED
    else:
        data = clips(bench, SAMPLES) if kind.takes_videos else pictures(bench, SAMPLES, 64)
        size = {"batch_size": 8, "micro_batch_size": 2}
    changes = {
        "webdataset_path": str(data), "updates": UPDATES_PER_TROUBLE * troubles, "save_every": 4, "keep_last": 2,
        "ema_start_iters": 2, "ema_beta": 0.9, "sample_count": 1, "sample_steps": 2, "num_workers": 0, "lanes": 2,
        "process_timeout_seconds": patience / 2,
    }  # fmt: skip
    known = kind.Config.model_fields.keys() - kind.Config.unused
    known_changes = {key: value for key, value in changes.items() if key in known}
    settings = script_settings(bench, name, "run", torch.device("cpu"), **known_changes, **size)
    left_out = {"num_frames", "batch_size", "image_size"} if mixed else set()
    return {key: value for key, value in settings.items() if key not in left_out}


@contextmanager
def failing_s3(data: Path, share: float, seed: int) -> Iterator[tuple[dict[str, str], FaultyProxy]]:
    """An S3 on this machine with a bucket `data` that holds a tar or the files of a folder, and an empty one, `runs`:
    the environment of processes that reach it through a proxy that fails."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        for bucket in ("data", "runs"):
            client.create_bucket(Bucket=bucket)
        for file in [data] if data.is_file() else sorted(data.glob("*.tar")):
            client.put_object(Bucket="data", Key=file.name, Body=file.read_bytes())
        with FaultyProxy(endpoint, share=share, seed=seed) as proxy:
            yield {
                "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": proxy.url,
                "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }, proxy  # fmt: skip
    finally:
        server.stop()


def disturbed(folder: Path, name: str, given: argparse.Namespace) -> str:
    """A line of the table: what became of a run of the script."""
    bench = Bench(folder / "bench", True, time.time(), folder / "scratch", "cpu")
    bench.scratch.mkdir(parents=True)
    settings = settings_of(bench, name, given.kills + given.full_disks, given.mixed, given.patience)
    case = f"train.{name.split()[0]}:{use_case(name).__name__}"
    whole = settings | {"checkpoint_path": str(folder / "whole")}
    seconds = given.patience * (1 + settings["updates"] / 10)
    began = time.monotonic()
    train(whole, 1, case=case, seconds=seconds)
    alone = time.monotonic() - began
    options = {"case": case, "patience": given.patience}
    chance = random.Random(given.seed)
    if given.faults:
        data = Path(settings["webdataset_path"])
        with failing_s3(data, given.faults, given.seed) as (environment, proxy):
            killed = settings | {
                "webdataset_path": "s3://data", "checkpoint_path": "s3://runs/all", "scratch_path": str(folder / "s3")
            }  # fmt: skip
            disturb(killed, COUNTS, chance, given.kills, given.full_disks, environment=environment, **options)
            faults = f"{proxy.met.total()} of {proxy.num_requests}"
    else:
        killed, faults = settings | {"checkpoint_path": str(folder / "killed")}, "no S3"
        disturb(killed, COUNTS, chance, given.kills, given.full_disks, **options)
    found = Difference.between(killed, whole)
    log = folder_of(killed).parent / "log.txt"
    if found.wrong_samples:
        raise RuntimeError(f"{name}: {found.wrong_samples} updates saw other samples; see {log}")
    cells = (
        name + " mixed" * given.mixed, given.kills, given.full_disks, faults, settings["updates"], found.wrong_samples,
        f"{max(found.early_loss, found.late_loss):.1e}", f"{found.weights:.1e}",
        f"{time.monotonic() - began:.0f} ({alone:.0f})",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="+", choices=SCRIPTS, metavar="SCRIPT", help=", ".join(SCRIPTS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full-disks", type=int, default=5, help="starts on which no file can grow")
    parser.add_argument("--faults", type=float, default=0.0, help="share of the requests to S3 that fail; 0: no S3")
    parser.add_argument("--mixed", action="store_true", help="clips and pictures, where a script takes both")
    parser.add_argument("--patience", type=float, default=300, help="seconds that a start, or an end after a kill, "
                        "may take: networks are built by four processes at once")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.mixed and (wrong := [name for name in given.scripts if not use_case(name).takes_videos]):
        parser.error(f"--mixed: {', '.join(wrong)} takes no clips")
    preload("warpcore.core", "diffusers", *(f"train.{name.split()[0]}" for name in given.scripts))
    print(
        "| script | kills | full disks | requests that failed | updates | of other samples | largest difference of a "
        "loss | of a weight | seconds (undisturbed) |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in given.scripts:
        with tempfile.TemporaryDirectory() as folder:
            print(disturbed(Path(folder), name, given), flush=True)


if __name__ == "__main__":
    main()
