"""Data with classes, a small DiT, and its published file, for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modules.dit import DiT

CLASSES = 5
SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 1, "in_channels": 16}
"""Of the mini's latents, 16 px of a picture per position."""


def write_classed(path: Path, members: list[dict[str, bytes]], size: int = 32) -> Path:
    """A tar of random pictures, each with further members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, further in enumerate(members):
            pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            for extension, data in ({"png": content.getvalue()} | further).items():
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def numbered(count: int) -> list[dict[str, bytes]]:
    """Members of samples whose class is their number modulo `CLASSES`."""
    return [
        {"cls": str(i % CLASSES).encode(), "json": json.dumps({"label": i % CLASSES}).encode()} for i in range(count)
    ]


def small_settings(folder: Path, data: Path | str, **changes) -> dict:
    return {
        "experiment_id": "run", "checkpoint_path": str(folder / "runs"), "webdataset_path": str(data), "device": "cpu",
        "model_version": "mini", "num_classes": CLASSES, "image_size": 32, "batch_size": 4, "updates": 2,
        "save_every": 2, "log_every": 1, "num_workers": 0, "lr": 0.01, "sample_steps": 1, "sample_count": 2,
        "crop_mode": "center",
    } | changes  # fmt: skip


def random_network(grid: int = 2, **changes) -> DiT:
    """A small DiT in which every layer does something."""
    torch.manual_seed(0)
    network = DiT(grid, num_classes=CLASSES, **(SMALL | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network
