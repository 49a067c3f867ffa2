"""Exported weights: in the precision and as often as the config says; what a run resumes from stays exact."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.small_cascade import small_cascade as small_cascade
from tests.warpcore.runs import numbers, tiny_settings, train_here, write_shard
from train.train_c import TrainStageC
from warpcore.config import Config, ConfigError, make_config
from warpcore.weights import export_weights

pytestmark = pytest.mark.integration
FILES = ("generator.safetensors", "generator_ema.safetensors")


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 12), updates=6, save_every=2)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_are_written_in_another_precision_and_the_run_stays_exact(settings, dtype):
    _, lines = train_here(settings)
    exact = Path(settings["checkpoint_path"], "tiny")
    smaller = settings | {"experiment_id": "smaller", "export_dtype": dtype}
    train_here(smaller | {"updates": 4})
    assert numbers(train_here(smaller)[1]) == numbers(lines)  # resumed in the middle
    for name in FILES:
        file = exact.with_name("smaller") / name
        assert metadata(file)["dtype"] == dtype
        assert metadata(exact / name)["dtype"] == "float32"
        found, expected = load_file(file), load_file(exact / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            wanted = tensor.to(getattr(torch, dtype)) if is_float(tensor) else tensor
            assert torch.equal(found[key], wanted), key


def test_files_are_written_as_often_as_the_config_says(settings):
    given = settings | {"export_every": 4, "updates": 7}
    folder = Path(given["checkpoint_path"], "tiny")
    exported = []

    def updates() -> tuple[int, ...]:
        return tuple(int(metadata(folder / name)["update"]) for name in FILES if (folder / name).exists())

    for last in (2, 4, 6):
        train_until(given, last)
        exported.append((updates(), json.loads((folder / "info.json").read_text())["update"]))
    assert exported == [((), 2), ((4, 4), 4), ((4, 4), 6)]
    train_here(given)
    assert updates() == (7, 7)


def train_until(settings: dict, update: int) -> None:
    """Train until a signal stops the run after an update."""
    from tests.warpcore.tiny import Denoiser, TinyConfig

    class Stopped(Denoiser):
        def encode(self, batch, random):
            if self.update == update - 1:
                self._request_stop(15)
            return super().encode(batch, random)

    train_here(settings, Stopped, TinyConfig)


def test_a_backup_has_its_weights(settings):
    train_here(settings | {"export_every": 4, "backup_every": 3, "updates": 5})
    backups = Path(settings["checkpoint_path"], "tiny", "backups")
    assert metadata(backups / "00000003" / FILES[0])["update"] == "3"


def test_a_script_starts_from_what_another_run_exported(small_cascade):
    run = small_cascade | {"experiment_id": "first", "export_dtype": "bfloat16"}
    assert TrainStageC(make_config(TrainStageC.Config, run)).run() == 0
    file = Path(run["checkpoint_path"], "first", FILES[0])
    begun = {}

    class Begun(TrainStageC):
        def build(self):
            networks = super().build()
            begun.update({name: t.clone() for name, t in networks["generator"].state_dict().items()})
            return networks

    again = run | {"experiment_id": "again", "generator_checkpoint_path": str(file)}
    assert Begun(make_config(TrainStageC.Config, again)).run() == 0
    stored = load_file(file)
    assert {t.dtype for t in stored.values() if is_float(t)} == {torch.bfloat16}
    assert stored.keys() == begun.keys()
    assert all(torch.equal(begun[key], tensor.to(begun[key].dtype)) for key, tensor in stored.items())


def test_numbers_too_large_for_float16_are_written_as_they_are(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_weights(tmp_path / "a.safetensors", {"a": torch.full((2,), 1e6)}, {"update": "1"}, torch.float16)
    assert "a.safetensors is not converted to export_dtype: a has numbers too large for float16" in caplog.text
    assert metadata(tmp_path / "a.safetensors") == {"update": "1", "dtype": "float32"}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.full((2,), 1e6))


def test_export_every_is_a_multiple_of_save_every(settings):
    keys = {key: value for key, value in settings.items() if key in Config.model_fields}
    with pytest.raises(ConfigError, match="export_every: 3 is no multiple of save_every 2"):
        make_config(Config, keys | {"export_every": 3})
