"""Helpers of the tests that run whole trainings: a small data set, runs in this process and in others."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import make_config

TINY = Path(__file__).parent / "tiny.py"


def write_shard(path: Path, num_samples: int, size: tuple[int, int] = (16, 16), first: int = 0) -> Path:
    """A tar of random pictures of `size` (H, W) with captions and scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + num_samples):
            pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "txt": f"picture {i}".encode(), "json": b'{"score": %d}' % i}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def tiny_settings(folder: Path, data: Path, **changes) -> dict:
    return {
        "experiment_id": "tiny", "checkpoint_path": str(folder), "webdataset_path": str(data), "updates": 12,
        "batch_size": 4, "image_size": 16, "save_every": 4, "log_every": 1, "num_workers": 0, "device": "cpu",
        "lr": 0.01, "ema_start_iters": 2, "ema_beta": 0.9, "crop_mode": "random",
    } | changes  # fmt: skip


def train_here(settings: dict, use_case=Denoiser, config=TinyConfig):
    """Run in this process; returns (exit status, lines of metrics.jsonl)."""
    run = use_case(make_config(config, settings))
    status = run.run()
    return status, read_metrics(settings)


def read_metrics(settings: dict) -> list[dict]:
    path = Path(settings["checkpoint_path"]) / settings["experiment_id"] / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(lines: list[dict]) -> list[tuple]:
    """What must be equal between runs: everything but times."""

    def is_time(name: str) -> bool:
        return name in ("samples_per_second", "data_wait") or name.startswith("ms/")

    return [tuple(sorted((k, v) for k, v in line.items() if not is_time(k))) for line in lines]


def start(
    settings: dict, script: Path = TINY, launcher: tuple[str, ...] = (), arguments: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Run a script in a process of its own; `arguments` come before the settings."""
    keys = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), *arguments, *keys]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def signal_at(process: subprocess.Popen, settings: dict, update: int, number: signal.Signals) -> None:
    """Send a signal once the run has written the line of `update`."""
    deadline = time.monotonic() + 120
    while not (lines := read_metrics(settings)) or lines[-1]["update"] < update:
        if process.poll() is not None:
            raise AssertionError(f"the run ended before update {update}: {process.communicate()[0]}")
        assert time.monotonic() < deadline, f"update {update} is not reached"
        time.sleep(0.01)
    process.send_signal(number)


def torchrun(num_processes: int) -> tuple[str, ...]:
    return (
        "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--master-addr", "127.0.0.1",
        "--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    )  # fmt: skip


def load_weights(settings: dict, name: str = "generator") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(settings["checkpoint_path"]) / settings["experiment_id"] / f"{name}.safetensors")
