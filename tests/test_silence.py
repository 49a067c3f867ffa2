"""A run writes its own lines to the terminal and nothing else: no warning of a library about what is meant to be."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.warpcore.runs import finish, start, tiny_settings, torchrun, write_shard
from warpcore.data.loader import Loader
from warpcore.data.reader import Reader

ROOT = Path(__file__).parents[1]
OWN_LINES = re.compile(
    r"\s*(\d+%\|.*|training data: .*|epoch \d+ is over: .*|update \d+: (samples in|validation loss) .*"
    r"|to draw with it: .*|\S+ is at update \d+.*"
    r"|keys that are not at their defaults:|pictures are drawn for .*|  \S.*|[\w -]+: +\d+%\|.*)?"
)


def noise(output: str) -> list[str]:
    """The lines that are not a script's own."""
    return [line for line in re.split(r"[\r\n]+", output) if not OWN_LINES.fullmatch(line)]


@pytest.mark.integration
@pytest.mark.parametrize(
    "launcher", [pytest.param((), marks=pytest.mark.slow), torchrun(2)], ids=["one process", "two processes"]
)
def test_a_run_and_its_resumption_write_only_their_own_lines(launcher, tmp_path):
    settings = tiny_settings(
        tmp_path / "runs", write_shard(tmp_path / "a.tar", 10), validation_samples=2, num_workers=1, updates=2
    )
    for updates in (2,) if launcher else (2, 4):
        status, output = finish(start(settings | {"updates": updates}, launcher=launcher), 240)
        assert status == 0, output
        assert noise(output) == []


@pytest.mark.integration
def test_more_workers_than_cpus_are_no_warning(monkeypatch):
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 0)
    with warnings.catch_warnings(), Loader([], Reader(captions=None), num_workers=1) as loader:
        warnings.simplefilter("error")
        assert list(loader) == []


def run(folder: Path, *words: object) -> subprocess.CompletedProcess:
    """What a command of the project wrote, started in a folder, as from a shell."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


SD_CONFIG = ROOT / "configs/training/quickstart_sd.yaml"
SD_KEYS = (
    "webdataset_path=a.tar", "updates=1", "save_every=1", "batch_size=4", "image_size=64", "multi_aspect_ratio=[1]",
    "sample_count=1", "sample_steps=1", "validation_samples=0", "num_workers=0", "device=cpu",
)  # fmt: skip
DRAWN = ("--steps", 1, "--image_size", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a short run of the mini Stable Diffusion, and what the run wrote."""
    folder = tmp_path_factory.mktemp("silence")
    write_shard(folder / "a.tar", 4, (64, 64))
    return folder, run(folder, "train/train_sd.py", SD_CONFIG, *SD_KEYS)


@pytest.mark.integration
def test_a_run_on_the_networks_of_libraries_writes_only_its_own_lines(stable_diffusion):
    """diffusers imports torchao where that is installed, which warns of both."""
    _, done = stable_diffusion
    assert noise(done.stderr) == []
    assert done.stdout == ""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("inference/text_to_image.py", "--run", "runs/quickstart_sd", "--prompts", "a circle", *DRAWN),
        ("inference/reconstruct.py", f"autoencoder_checkpoint_path={ROOT}/models/mini/autoencoder.safetensors",
         "pictures=picture.png", "device=cpu"),
        ("tools/cache.py", ROOT / "train/train_sd.py", SD_CONFIG, "cache", *SD_KEYS),
        ("tools/memory.py", ROOT / "train/train_sd.py", SD_CONFIG, *SD_KEYS),
        ("tools/search_batch_size.py", ROOT / "train/train_sd.py", SD_CONFIG, "new/tuned.yaml", *SD_KEYS,
         "--max-memory", 4),
        ("tools/export.py", "diffusers", "runs/quickstart_sd", "exported"),
        ("tools/export.py", "single-file", "runs/quickstart_sd", "exported.safetensors"),
        ("train/train_vae.py", ROOT / "configs/training/mini_vae.yaml", *SD_KEYS[:6], *SD_KEYS[8:]),
        ("train/train_sd_lora.py", ROOT / "configs/training/quickstart_sd_lora.yaml", *SD_KEYS, "prior_path=null",
         "train_tokens=null", "token_lr_scale=1", 'sample_prompts=["a"]',
         "generator_checkpoint_path=runs/quickstart_sd/generator.safetensors"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])).removeprefix(str(ROOT)),
)  # fmt: skip
def test_tools_and_drawing_write_nothing_of_libraries(stable_diffusion, words):
    folder, _ = stable_diffusion
    Image.new("RGB", (64, 64)).save(folder / "picture.png")
    assert noise(run(folder, *words).stderr) == []
