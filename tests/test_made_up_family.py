"""A family that is made up, of convolutions alone, gets what the cascade has, from its own script and folder."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from families import registry
from inference import text_to_image
from tests.made_up_family.networks import LetterCount, Squeeze
from tests.made_up_family.train_made_up import MadeUpConfig, TrainMadeUp
from tests.many_processes import launch_processes
from tests.tiers import represented_by
from tests.warpcore.runs import numbers, read_metrics, write_shard
from tools import cache, export, memory, search_batch_size
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).parent / "made_up_family" / "train_made_up.py"


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setattr(registry, "PACKAGES", ["families", "tests"])
    monkeypatch.setattr(cache, "TIMED_SAMPLES", 8)


@pytest.fixture
def settings(tmp_path) -> dict:
    torch.manual_seed(0)
    save_file(Squeeze().state_dict(), tmp_path / "squeeze.safetensors")
    save_file(LetterCount().state_dict(), tmp_path / "letters.safetensors")
    return {
        "experiment_id": "run", "checkpoint_path": str(tmp_path / "runs"), "updates": 4, "save_every": 2,
        "webdataset_path": str(write_shard(tmp_path / "a.tar", 8, (16, 32))), "batch_size": 4, "image_size": 16,
        "num_workers": 0, "device": "cpu", "lr": 0.01, "log_every": 1, "validation_samples": 2, "sample_count": 2,
        "sample_steps": 2, "squeeze_path": str(tmp_path / "squeeze.safetensors"),
        "letters_path": str(tmp_path / "letters.safetensors"), "ema_start_iters": 1, "ema_beta": 0.5,
    }  # fmt: skip


def train(settings: dict, **changes) -> list[dict]:
    run = TrainMadeUp(make_config(MadeUpConfig, settings | changes))
    assert run.run() == 0
    return read_metrics(settings | changes)


def run_tool(main, *arguments: object) -> str:
    """What a tool prints, run in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main()
    return printed.getvalue()


def config_file(settings: dict, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def draw(tmp_path: Path, *arguments: str) -> list[np.ndarray]:
    folder = tmp_path / f"drawn_{len(list(tmp_path.glob('drawn_*')))}"
    run_tool(text_to_image.main, "prompts=[a cloud]", "image_size=16", "steps=3", "sampler=ddim", "device=cpu",
             f"output_path={folder}", *arguments)  # fmt: skip
    return [np.array(Image.open(path)).astype(int) for path in sorted(folder.glob("0*.png"))]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


# ------------------------------------------------------------------ what it gets


def caches(settings, tmp_path):
    expected = train(settings, crop_mode="center")
    given = settings | {"crop_mode": "center"}
    out = tmp_path / "cache"
    run_tool(cache.main, SCRIPT, config_file(given, tmp_path), out, "--dtype", "float32")
    run = TrainMadeUp(make_config(MadeUpConfig, given | {"experiment_id": "cached", "webdataset_path": str(out)}))
    built = []
    build = run.build
    run.build = lambda: built.append(build()) or built[0]
    assert run.run() == 0
    assert built[0].keys() == {"generator", "squeeze"}, "no text encoder; the autoencoder draws"
    found = read_metrics(given | {"experiment_id": "cached"})
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    moved = tmp_path / "other.safetensors"
    save_file(Squeeze().state_dict(), moved)
    with pytest.raises(ConfigError, match="the weights of the squeeze network are"):
        train(given, experiment_id="other", webdataset_path=str(out), squeeze_path=str(moved))


def resuming(settings, tmp_path):
    whole = train(settings)
    train(settings, experiment_id="halves", updates=2)
    assert numbers(train(settings, experiment_id="halves")) == numbers(whole)


def lora(settings, tmp_path):
    train(settings)
    base = tmp_path / "runs" / "run" / "generator.safetensors"
    given = {"experiment_id": "lora", "generator_checkpoint_path": str(base), "rank": 2, "ema_start_iters": None}
    train(settings, **given)
    tensors = load_file(tmp_path / "runs" / "lora" / "lora.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if name.endswith("up"))
    with_lora, without = (
        draw(tmp_path, f"run={tmp_path / 'runs' / name}", "use_ema=false") for name in ("lora", "run")
    )
    assert np.abs(with_lora[0] - without[0]).max() > 0
    with pytest.raises(ConfigError, match="cloud_width 8, not 16"):
        train(settings, experiment_id="wide", generator_checkpoint_path=str(base), cloud_width=16)


def sampling(settings, tmp_path):
    train(settings)
    run = f"run={tmp_path / 'runs' / 'run'}"
    assert draw(tmp_path, run)[0].shape == (16, 16, 3)
    alone, beside = draw(tmp_path, run, "seeds=[5]"), draw(tmp_path, run, "seeds=[4, 5]")
    assert np.abs(alone[0] - beside[1]).max() <= 1
    with pytest.raises(UserError, match=r"do not tell which family is meant \(Stable Cascade, .*Made up\)"):
        draw(tmp_path)
    with pytest.raises(SystemExit):
        run_tool(text_to_image.main, "--help")


def exports(settings, tmp_path):
    train(settings)
    for form in ("cloud", "diffusers"):  # the latter is a format of the cascade, too
        out = tmp_path / f"exported_{form}"
        run_tool(export.main, form, tmp_path / "runs" / "run", out)
        assert registry.family_of(out).name == "made_up_family"
        ours = load_file(tmp_path / "runs" / "run" / "generator_ema.safetensors")
        theirs = load_file(out / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def planner(settings, tmp_path):
    for path in ("squeeze_path", "letters_path"):
        Path(settings[path]).unlink()  # nothing is loaded
    said = run_tool(memory.main, SCRIPT, config_file(settings, tmp_path), "--gpu-memory", "1")
    assert "| 3 | 16 x 16 |" in said
    assert "fits 1 GiB: this config" in said


def batch_size_search(settings, tmp_path):
    tuned = tmp_path / "tuned.yaml"
    run_tool(search_batch_size.main, SCRIPT, config_file(settings, tmp_path), tuned, "--max-memory", 0.001)
    assert train(yaml.safe_load(tuned.read_text()))


def checkpointing(settings, tmp_path):
    plain = train(settings)
    assert losses(train(settings, experiment_id="again", activation_checkpointing=3)) == pytest.approx(losses(plain))


def offload(settings, tmp_path):
    plain, keys = train(settings), {"offload": ["encoders", "activations"], "activation_checkpointing": 3}
    assert losses(train(settings, experiment_id="away", **keys)) == pytest.approx(losses(plain))


def compiling(settings, tmp_path):
    plain = train(settings)
    assert losses(train(settings, experiment_id="fused", compile=True)) == pytest.approx(losses(plain), rel=1e-4)


def two_processes(settings, tmp_path):
    settings |= {"micro_batch_size": 2, "updates": 2}
    plain = train(settings)
    together = settings | {"experiment_id": "two", "use_fsdp": True}
    launch_processes(2, train, together)
    assert losses(read_metrics(together)) == pytest.approx(losses(plain), rel=1e-5)


ABILITIES = {
    ability.__name__: ability
    for ability in (
        caches, resuming, lora, sampling, exports, planner, batch_size_search, checkpointing, offload, compiling,
        two_processes,
    )
}  # fmt: skip


@pytest.mark.parametrize("ability", represented_by("caches", "lora", "sampling", "exports", "planner", of=ABILITIES))
def test_a_family_has_it_from_its_own_script_and_folder(settings, tmp_path, ability):
    ABILITIES[ability](settings, tmp_path)


def test_its_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 100
