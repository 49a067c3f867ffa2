"""Exported weights: in the precision and as often as the config says; what a run resumes from stays exact."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from families.common.weight_files import metadata_of, weights_of_run
from families.common.weights import read_weights
from tests.many_processes import run_in_two_processes
from tests.small_cascade import small_cascade as small_cascade
from tests.warpcore.runs import numbers, tiny_settings, train_here, write_shard
from train.train_c import TrainStageC
from warpcore import weights
from warpcore.config import Config, ConfigError, make_config
from warpcore.errors import UserError
from warpcore.exports import INDEX, file_metadata, take, write_parts
from warpcore.meta import PeakMemory
from warpcore.processes import Processes
from warpcore.weights import export_weights

pytestmark = pytest.mark.integration
ALONE = Processes(0, 1, torch.device("cpu"))
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
        def make_networks(self, saved=None):
            super().make_networks(saved)
            begun.update({name: t.clone() for name, t in self.networks["generator"].state_dict().items()})

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


def test_a_network_too_large_for_a_file_is_exported_in_parts_that_read_alike(settings, tmp_path):
    """Exported as the run does it, read as our own weights and by the index that libraries read."""
    given = settings | {"updates": 2, "backup_every": 2}
    train_here(given)
    whole = Path(given["checkpoint_path"], "tiny")
    expected = [load_file(whole / name) for name in FILES]
    small = given | {"experiment_id": "parts", "export_file_gb": 1e-6}
    train_here(small)
    folder = whole.with_name("parts")
    for stem, tensors in zip(("generator", "generator_ema"), expected, strict=True):
        index = json.loads((folder / f"{stem}{INDEX}").read_text())
        names = sorted(set(index["weight_map"].values()))
        assert len(names) > 1
        assert names == [f"{stem}-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for place in (folder, folder / "backups" / "00000002"):
            found = read_weights(place / f"{stem}{INDEX}", "generator_checkpoint_path")
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
            assert metadata_of(place / f"{stem}{INDEX}")["update"] == "2"
        assert not (folder / f"{stem}.safetensors").exists()
    assert weights_of_run(folder, "generator", use_ema=True) == folder / f"generator_ema{INDEX}"
    train_here(small | {"updates": 3, "export_file_gb": 20.0})  # in one file again: the others are gone
    assert {path.name for path in folder.glob("*generator*")} == {*FILES}


def test_parts_of_two_exports_are_not_read_as_one(tmp_path):
    tensors = {"a": torch.zeros(300), "b": torch.ones(300)}
    for update in (1, 2):
        parts = write_parts(tmp_path / "g", tensors, file_metadata({}, update), None, 1000, ALONE)
        if update == 1:
            parts.publish()
    final, partial = next(iter(parts.partial.items()))
    partial.replace(final)  # where the machine went down
    with pytest.raises(UserError, match=r"g-00001-of-00002.safetensors is of update 2, but g.safetensors.index.json"):
        read_weights(tmp_path / f"g{INDEX}", "key")


def test_a_full_disk_ends_a_save_of_parts_for_every_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "content", refuse)
    parts = write_parts(tmp_path / "g", {"a": torch.zeros(3), "b": torch.zeros(3)}, {}, None, 12, ALONE)
    with pytest.raises(OSError, match="No space left"):
        parts.publish()


def test_numbers_too_large_for_a_precision_are_noticed_before_parts_are_written(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tensors = {"a": torch.full((2,), 1e6), "b": torch.zeros(2)}
        write_parts(tmp_path / "g", tensors, {}, torch.float16, 8, ALONE).publish()
    assert "g is not converted to export_dtype: a has numbers too large for float16" in caplog.text
    assert torch.equal(read_weights(tmp_path / f"g{INDEX}", "key")["a"], tensors["a"])


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_is_named(tmp_path, index):
    (tmp_path / f"g{INDEX}").write_text(index)
    with pytest.raises(UserError, match=r"g.safetensors.index.json is not the index of a network in several files"):
        read_weights(tmp_path / f"g{INDEX}", "key")


def test_no_process_holds_a_sharded_network_to_export_it(tmp_path):
    run_in_two_processes(_export_sharded, tmp_path)


def _export_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    tensors = {f"layer{i}": torch.randn(64, 64) for i in range(8)}
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    processes = Processes(dist.get_rank(), 2, torch.device("cpu"))
    largest = tensors["layer0"].nbytes
    with PeakMemory([*tensors.values(), *sharded.values()]) as memory:
        parts = take(folder / "g", sharded, {}, None, 3 * largest, processes)
    assert memory.peak <= 2 * largest, memory.peak  # gathered, with the buffer that it was gathered in
    if processes.is_main:
        parts.publish()
        found = read_weights(folder / f"g{INDEX}", "key")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert len([*folder.glob("*.safetensors")]) == 3
