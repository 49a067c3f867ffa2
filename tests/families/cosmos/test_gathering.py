"""What a save of a sharded run brings together on a process: a tensor at a time, and of a LoRA the LoRA alone."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from families.common.weights import read_weights
from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.many_processes import launch_processes
from tests.train.test_every_script import use_case
from tests.warpcore.runs import tiny_settings, write_shard
from warpcore.config import make_config

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def _member(name: str, settings: dict, told: Path) -> None:
    """Train, and note what was gathered: all bytes, and the most that there were at a time."""
    plain, alive, gathered = DTensor.full_tensor, [0], {"total": 0, "peak": 0}

    def counted(tensor: DTensor, *args, **kwargs) -> torch.Tensor:
        whole = plain(tensor, *args, **kwargs)
        size = whole.untyped_storage().nbytes()
        alive[0] += size
        gathered["total"] += size
        gathered["peak"] = max(gathered["peak"], alive[0])
        weakref.finalize(whole.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return whole

    DTensor.full_tensor = counted
    kind = use_case(name)
    run = kind(make_config(kind.Config, settings))
    assert run.run() == 0
    told.with_suffix(f".{run.processes.rank}").write_text(json.dumps(gathered))


@pytest.mark.parametrize("name", ["train_cosmos", "train_cosmos_lora"])
def test_a_save_gathers_no_network(name, tmp_path):
    settings = tiny_settings(
        tmp_path, write_shard(tmp_path / "a.tar", 4), model_version="mini", text_encoder_precision="float32",
        generator_checkpoint_path=str(write_cosmos(tmp_path / "pipeline")), updates=1, save_every=1, sample_steps=1,
        sample_count=1, use_fsdp=True, ema_start_iters=0, export_file_gb=1e-6, batch_size=2, micro_batch_size=1,
        clip_grad_norm=None, image_size=32,
    )  # fmt: skip
    launch_processes(2, _member, name, settings, tmp_path / "told")
    exported = {
        path.name.partition(".")[0]: read_weights(path, "file")
        for path in (tmp_path / "tiny").glob("*.safetensors*")
        if path.name.endswith("index.json")
    }
    stem = "lora" if name.endswith("lora") else "generator"
    assert exported.keys() == {stem, f"{stem}_ema"}
    sizes = [tensor.nbytes for tensors in exported.values() for tensor in tensors.values()]
    for rank in range(2):
        gathered = json.loads((tmp_path / f"told.{rank}").read_text())
        assert gathered["peak"] <= 2 * max(sizes)
        assert gathered["peak"] < 0.5 * sum(sizes)
        assert gathered["total"] <= 1.1 * sum(sizes)  # the frozen network is in no export, and stays where it is
