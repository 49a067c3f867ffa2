"""A machine that has only what a training uses can train: the other packages are imported where they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warpcore.runs import read_metrics, write_shard

ROOT = Path(__file__).parents[2]
UNUSED = [
    "wandb", "tensorboard", "boto3", "botocore", "obstore", "huggingface_hub", "kornia", "torchmetrics",
    "transformers", "timm", "diffusers", "peft", "torchao", "bitsandbytes", "schedulefree", "webdataset",
]  # fmt: skip
"""For tracking, S3, hubs, picture metrics, peers and optimizers: no plain update uses them."""
BLOCKED_RUN = (
    "import json, runpy, sys; missing, script, *sys.argv[1:] = sys.argv[1:]; "
    "sys.modules.update(dict.fromkeys(json.loads(missing))); sys.argv[0] = script; "
    "runpy.run_path(script, run_name='__main__')"
)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("script", "missing"),
    [("train_a", [*UNUSED, "open_clip"]), pytest.param("train_c", UNUSED, marks=pytest.mark.slow)],
)
def test_a_script_trains_without_the_packages_that_it_does_not_use(script, missing, tmp_path):
    settings = {
        "experiment_id": "bare", "checkpoint_path": str(tmp_path), "model_version": "mini", "updates": 1,
        "webdataset_path": str(write_shard(tmp_path / "a.tar", 4, (64, 64))), "batch_size": 2, "image_size": 64,
        "num_workers": 0, "device": "cpu",
    }  # fmt: skip
    keys = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, "-c", BLOCKED_RUN, json.dumps(missing), str(ROOT / "train" / f"{script}.py"), *keys]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line["update"] for line in read_metrics(settings)] == [1]


IMPORTED = """
import contextlib, importlib, io, json, pkgutil, runpy, sys
libraries = ("diffusers", "transformers", "peft")
names = [m.name for package in ("families", "train") for m in pkgutil.walk_packages([package], f"{package}.")]
assert "families.common.autoencoders" in names and "train.train_c" in names
for name in names:
    if name not in json.loads(sys.argv[1]):
        importlib.import_module(name)
    assert not set(libraries) & sys.modules.keys(), name
sys.argv[1:] = ["--help"]
for module in (module for module in pkgutil.iter_modules(["tools"]) if not module.ispkg):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module(f"tools.{module.name}", run_name="__main__")
    assert not set(libraries) & sys.modules.keys(), module.name
"""
LATE = [
    "families.cascade.diffusers_folder",
    "families.common.transformers_text",
    "families.cosmos.transformer",
    "families.dit.pixart_transformer",
]
"""Modules that are imported where an export calls them, or a network is built, and nowhere else."""


@pytest.mark.integration
def test_no_module_of_a_family_or_a_script_and_no_help_imports_a_library_of_networks():
    """Importing diffusers costs seconds and half a gigabyte in each loader worker, which import a script's modules."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(LATE)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
