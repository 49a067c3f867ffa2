"""On a GPU, Python runs ahead of the computation: an update waits for no result and for no copy.

And nothing, in updates, validation or samples, computes with tensors of two devices.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from modules.filters import InpaintFilter, PidiFilter
from modules.filters.pidinet import PiDiNet
from modules.filters.saliency import Saliency
from tests.caches import make_cache, write_pictures
from tests.fake_gpu import GPU, FakeGpu, Waits
from tests.tiers import represented_by
from tests.train.test_every_script import OF_CLIPS, SETTINGS, settings, use_case  # noqa: F401
from tests.train.test_separate_caches import CACHED
from warpcore.config import make_config
from warpcore.meta import MetaAsDevice

FURTHER: dict[str, dict] = {
    "train_c": {
        "clip_image_dropout": 0.5, "adaptive_loss_weight": True, "offset_noise": 0.1, "gradient_topk": 0.3,
        "grad_mean_groups": {"weights": "weight$"}, "grad_mean_per_block": True,
    },
    "train_c_controlnet": {"cache_text": True, "grad_norm_groups": {"hint": "backbone"}},
    "train_c_lora": {
        "caption_templates": ["a [fernando] {caption}", "[fernando]"], "masked_loss": True, "min_rank": 1,
    },
    "train_pixart": {
        "fused_backward": True, "optimizer": "came", "clip_grad_norm": None,
        "clip_tensor_norm": 1.0, "grad_norm_groups": {"all": "."}, "grad_mean_groups": {"weights": "weight$"},
    },
    "train_sd": {
        "train_text_encoder": True, "text_chunks": 2, "loss_type": "huber", "min_snr_gamma": 5.0,
        "input_perturbation": 0.1, "multires_noise_iterations": 3, "shuffle_tags": True,
        "start_from_scratch": [{"pattern": "generator.conv_in.*"}],
    },
}  # fmt: skip
"""Settings that make a script decide more."""


def train_on_gpu(name: str, settings: dict, dtype: torch.dtype = torch.bfloat16) -> None:  # noqa: F811
    """Updates of a use case, of which one with samples seen before must not wait; then all that may."""
    kind = use_case(name)
    run = kind(make_config(kind.Config, {"clip_grad_norm": 1.0} | settings))
    run.device, run.processes = GPU, replace(run.processes, device=GPU)
    run.dtype, run.autocast = dtype, partial(MetaAsDevice, "cuda", dtype) if dtype.itemsize < 4 else nullcontext
    with FakeGpu() as gpu:
        run.setup()
        batch = next(run.feed.batches())
        run.make_update(iter([batch]))
        with gpu.watched():
            run.make_update(iter([batch]))
        run.metrics.flush()
        run._validate()
        run._draw()
        assert all(parameter.device == GPU for parameter in run.parameters.values())
    run.close()


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_c", of=SETTINGS))
def test_from_pictures(settings, name, tmp_path):  # noqa: F811
    is_masked = "lora" in name and name not in OF_CLIPS
    masked = {"webdataset_path": str(write_pictures(tmp_path / "masked" / "0.tar", 6))} if is_masked else {}
    train_on_gpu(name, settings(name, "update", **FURTHER.get(name, {}), **masked))


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", represented_by("train_c", of=[n for n, kinds in CACHED.items() if "latents" in kinds])
)
def test_from_a_cache(settings, name, tmp_path):  # noqa: F811
    given = settings(name, "update", **FURTHER.get(name, {}))
    if name not in OF_CLIPS:
        given["webdataset_path"] = str(write_pictures(tmp_path / "pictures" / "0.tar", 6))
    train_on_gpu(name, given | {"webdataset_path": str(make_cache(name, given, tmp_path / "cache"))})


@pytest.mark.parametrize("kind", [PidiFilter, InpaintFilter])
def test_filters_that_compute_on_the_gpu(kind, tmp_path):
    network, key = (PiDiNet(), "checkpoint_path") if kind is PidiFilter else (Saliency(), "saliency_checkpoint_path")
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    filter = kind(**{key: tmp_path / "network.safetensors"})
    with FakeGpu() as gpu:
        filter.to(GPU)
        with gpu.watched():
            assert filter(torch.zeros(3, 3, 64, 64, device=GPU)).condition.device == GPU


WAITING = {
    "a number": lambda gpu: gpu.sum().item(),
    "a decision": lambda gpu: bool(gpu.any()),
    "a mask": lambda gpu: gpu[gpu > 0],
    "a count": lambda gpu: torch.bincount(gpu.long().flatten(), minlength=4),
    "checked lengths": lambda gpu: torch.segment_reduce(gpu, "sum", lengths=gpu[0].long()),
    "to the CPU": lambda gpu: gpu.cpu(),
    "from the CPU": lambda gpu: torch.ones(2).to(gpu.device),
    "of Python's numbers": lambda gpu: torch.tensor([1.0, 2.0], device=gpu.device),
    "not pinned": lambda gpu: torch.ones(2).to(gpu.device, non_blocking=True),
    "pinned, but awaited": lambda gpu: torch.ones(2).pin_memory().to(gpu.device),
    "rows by a list": lambda gpu: gpu[[0, 1]],
    "two devices": lambda gpu: gpu + torch.ones(2),
}


@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_noticed(what):
    with FakeGpu() as gpu, gpu.watched():
        there = torch.ones(2, 2, device=GPU)
        there[0] = 1.0
        there * torch.tensor(2.0) + torch.ones(2).pin_memory().to(GPU, non_blocking=True)
        with pytest.raises((Waits, DataDependentOutputException, DynamicOutputShapeException)):
            WAITING[what](there)
