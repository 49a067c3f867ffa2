"""What holds for every training script: exact resuming, accumulation, updates that are not finite, two processes.

That it goes on after a kill, and on other numbers of processes, is in `test_other_numbers_of_processes.py`.

A new script joins by its name in `SETTINGS`; one that is missing there fails a test.
"""

import importlib
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families.cascade import versions
from tests.clips import write_clips
from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.families.open_sora.tiny import write_wan
from tests.families.stable_diffusion.tiny_pipeline import write_sdxl
from tests.many_processes import launch_processes
from tests.small_cascade import put_cascade
from tests.tiers import represented_by
from tests.warpcore.runs import numbers, read_metrics, write_shard
from warpcore.config import make_config
from warpcore.core import STOPPED_EARLY, WarpCore
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

IMAGE_TOWER = Path(__file__).parents[2] / "models" / "mini" / "image_tower.safetensors"
MINI_T5 = IMAGE_TOWER.with_name("t5.safetensors")
SETTINGS: dict[str, dict] = {
    "train_a": {"discriminator_start": 1, "discriminator_channels": 8, "dead_code_use": 0.5},
    "train_b": {"offset_noise": 0.1},
    "train_b joint": {"train_encoder": True},
    "train_c": {"clip_image_dropout": 1.0},
    "train_c_controlnet": {"controlnet_blocks": [1, 4], "controlnet_filter": "InpaintFilter", "lr": 0.01},
    "train_c_lora": {
        "module_filters": [".attn"], "rank": 2, "lr": 0.01, "train_tokens": [["[fernando]", "^picture</w>"]],
    },
    "train_cosmos": {"model_version": "mini", "loss_reduce": "sum", "text_encoder_precision": "float32"},
    "train_cosmos_lora": {"model_version": "mini", "rank": 2, "lr": 0.01, "text_encoder_precision": "float32"},
    "train_cosmos techniques": {
        "model_version": "mini", "text_encoder_precision": "float32", "tread": {"start": 0, "end": 2},
        "repa": {"encoder": str(IMAGE_TOWER), "block": 1, "projector_width": 16},
    },
    "train_dit": {
        "model_version": "mini", "class_getter": ["txt", "lambda t: len(t) % 7"], "num_classes": 7,
        "sample_sampler": "ddim",
    },
    "train_dit techniques": {
        "model_version": "mini", "class_getter": ["txt", "lambda t: len(t) % 7"], "num_classes": 7, "tread": True,
        "repa": {"encoder": str(IMAGE_TOWER), "projector_width": 16},
    },
    "train_encoder": {},
    "train_latte": {
        "model_version": "mini", "class_getter": ["txt", "lambda t: len(t) % 7"], "num_classes": 7,
        "sample_sampler": "ddim", "num_frames": 2, "frame_stride": 2,
    },
    "train_nova": {
        "model_version": "mini-video", "text_encoder_precision": "float32", "num_frames": 5, "loss_repeat": 2,
        "sample_groups": 2, "caption_dropout": 0.5,
    },
    "train_nova pictures": {
        "model_version": "mini", "text_encoder_precision": "float32", "num_frames": 1, "sample_groups": 2,
        "diffusion_target": "epsilon",
    },
    "train_nova classes": {
        "model_version": "mini", "num_frames": 1, "sample_groups": 2, "num_classes": 7,
        "class_getter": ["txt", "lambda t: len(t) % 7"],
    },
    "train_pixart": {"model_version": "mini", "text_encoder_precision": "float32", "sample_sampler": "iddpm"},
    "train_pixart_lora": {
        "model_version": "mini", "rank": 2, "lr": 0.01, "text_encoder_precision": "float32",
        "module_filters": ["attn1", "proj_out"],  # of a random start, the last layer is zero
        "adapter": "lokr", "factor": 4,
    },
    "train_sd": {"model_version": "sdxl", "sample_sampler": "euler"},
    "train_sd texts": {"train_text_encoder": True, "text_encoder_lr": [1e-3, 1e-4], "model_version": "sdxl"},
    "train_sd t5": {
        "model_version": "sdxl", "text_model": "t5", "text_tokens": 8, "diffusion_target": "rectified_flows",
        "change_target": True, "sample_sampler": "euler", "text_encoder_checkpoint_path": str(MINI_T5),
    },
    "train_sd_lora": {
        "model_version": "sdxl", "module_filters": ["to_q", "conv1"], "rank": 2, "lr": 0.01, "dora": True,
        "text_encoder_filters": ["self_attn"], "text_encoder_lr": 0.005, "train_tokens": [["[fernando]", "^p"]],
    },
    "train_stdit": {
        "model_version": "mini", "text_encoder_precision": "float32", "num_frames": 5, "sample_sampler": "euler",
        "mask_ratios": {"image_head": 0.5},
    },
    "train_stdit 1.0": {
        "model_version": "mini-1.0", "text_encoder_precision": "float32", "num_frames": 3, "sample_sampler": "iddpm",
    },
    "train_stdit 1.1": {
        "model_version": "mini-1.1", "text_encoder_precision": "float32", "num_frames": 3, "sample_sampler": "iddpm",
        "mask_ratios": {"image_head": 0.5},
    },
    "train_stdit_lora": {
        "model_version": "mini", "text_encoder_precision": "float32", "num_frames": 5, "sample_sampler": "euler",
        "rank": 2, "lr": 0.01, "adapter": "loha",
    },
    "train_towers": {
        "words": ["picture"], "tower_width": 16, "tower_heads": 2, "text_length": 6, "text_layers": 1,
        "image_layers": 1, "image_tower_size": 16, "image_tower_patch": 8,
    },
    "train_towers t5": {
        "words": ["picture"], "text_encoder": "t5", "tower_width": 16, "tower_heads": 2, "text_length": 6,
        "text_layers": 1, "image_layers": 1, "image_tower_size": 16, "image_tower_patch": 8,
    },
    "train_video_vae": {  # pictures are clips of one frame
        "num_frames": 1, "base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "z_dim": 2, "means_weight": 1.0,
        "discriminator_start": 1, "discriminator_channels": 8,
    },
    "train_vae": {
        "block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2,
        "mid_block_attention": False, "means_weight": 1.0, "discriminator_start": 1, "discriminator_channels": 8,
    },
}  # fmt: skip
NEEDS_WHOLE_BATCHES = {
    "train_a", "train_b joint", "train_encoder", "train_nova", "train_nova classes", "train_nova pictures",
    "train_towers", "train_towers t5",
}  # fmt: skip
"""Batch norms and contrastive losses look at a micro-batch as a whole, and NOVA hides as much of each of its samples:
accumulation is another training."""

WITHOUT_COMPILING = {"train_a", "train_encoder", "train_towers", "train_towers t5"}
"""Scripts whose networks have no blocks to compile."""

PIPELINES = {"train_sd": write_sdxl, "train_cosmos": write_cosmos}
"""What writes the pipeline that scripts with such a name start from."""
OF_CLIPS = {"train_latte", "train_nova", "train_stdit", "train_stdit 1.0", "train_stdit 1.1", "train_stdit_lora"}
"""What is trained on clips; the others are on pictures."""
OF_LATENT_CLIPS = {"train_nova", "train_stdit", "train_stdit_lora"}
"""What has an autoencoder of clips."""
NEEDS_GENERATOR = {"train_c_controlnet", "train_c_lora"}
"""What is trained here only steers Stage C: it needs one that is trained."""


def use_case(name: str) -> type[WarpCore]:
    module = importlib.import_module(f"train.{name.split()[0]}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return next(kind for kind in own if issubclass(kind, WarpCore))


def settings_of(cascade: dict, name: str, run: str) -> dict:
    """Settings of a short run of a script, with a small cascade."""
    every = cascade | {
        "experiment_id": run, "updates": 4, "save_every": 2, "log_every": 1, "seed": 3, "ema_start_iters": 1,
        "ema_beta": 0.5, "validation_samples": 2, "sample_count": 2, "sample_steps": 2,
    }  # fmt: skip
    if kind := next((kind for kind in PIPELINES if name.startswith(kind)), None):
        pipeline = Path(cascade["checkpoint_path"]).with_name(f"pipeline_{kind}")
        every["generator_checkpoint_path"] = str(pipeline if pipeline.exists() else PIPELINES[kind](pipeline))
    elif name not in NEEDS_GENERATOR:
        del every["generator_checkpoint_path"]  # that of another network
    if name in OF_CLIPS:
        clips = Path(cascade["checkpoint_path"]).with_name("clips.tar")
        every["webdataset_path"] = str(clips if clips.exists() else write_clips(clips, 6, size=(64, 64)))
    if name in OF_LATENT_CLIPS:
        file = Path(cascade["checkpoint_path"]).with_name("wan.safetensors")
        every["autoencoder_checkpoint_path"] = str(file if file.exists() else write_wan(file))
    kind = use_case(name).Config
    known = kind.model_fields.keys() - kind.unused
    return {key: value for key, value in every.items() if key in known} | SETTINGS[name]


@pytest.fixture
def settings(small_cascade):
    return lambda name, run, **changes: settings_of(small_cascade, name, run) | changes


@pytest.fixture(scope="module")
def baseline(cascade_files, tmp_path_factory):
    """Gives settings and metrics of an undisturbed run of a script, which is trained once; no test may change it."""
    runs = {}

    def of(name: str) -> tuple[dict, list[dict]]:
        if name not in runs:
            folder = tmp_path_factory.mktemp("baseline")
            with pytest.MonkeyPatch.context() as patch:
                settings = settings_of(put_cascade(cascade_files, folder, patch), name, "whole")
                runs[name] = settings, train(name, settings), folder, times(folder)
        return runs[name][:2]

    yield of
    assert all(times(folder) == written for *_, folder, written in runs.values()), "a test changed a baseline run"


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def train(name: str, settings: dict, kind: type[WarpCore] | None = None) -> list[dict]:
    kind = kind or use_case(name)
    assert kind(make_config(kind.Config, settings)).run() == 0
    return read_metrics(settings)


def files(settings: dict) -> dict[str, dict[str, torch.Tensor]]:
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"]
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_every_script_is_tested_here():
    scripts = {path.stem for path in (Path(__file__).parents[2] / "train").glob("train_*.py")}
    assert scripts == {name.split()[0] for name in SETTINGS}


@pytest.mark.bits
@pytest.mark.parametrize("name", represented_by("train_c", of=SETTINGS))
def test_a_run_in_two_halves_is_the_run_in_one(small_cascade, baseline, name):
    whole, lines = baseline(name)
    halves = whole | {"checkpoint_path": small_cascade["checkpoint_path"]}
    train(name, halves | {"updates": 2})
    assert numbers(train(name, halves)) == numbers(lines)
    assert all(torch.tensor([line["loss"], line["raw_loss"]]).isfinite().all() for line in lines)
    ours, theirs = files(halves), files(whole)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        for key, tensor in tensors.items():
            assert torch.equal(ours[file][key], tensor), (file, key)
    plain = {file for file in theirs if not file.endswith("_ema")}
    assert {f"{file}_ema" for file in plain} <= theirs.keys()
    assert all(any(not torch.equal(t, theirs[f"{f}_ema"][k]) for k, t in theirs[f].items()) for f in plain)
    assert (Path(whole["checkpoint_path"]) / "whole" / "samples").exists() or name.startswith("train_towers")


@pytest.mark.parametrize("name", represented_by("train_c", of=SETTINGS.keys() - NEEDS_WHOLE_BATCHES))
def test_accumulation_makes_the_same_update(small_cascade, baseline, name):
    whole, lines = baseline(name)
    # Another micro-batch size is another order of the samples, but for the first epoch of one bucket.
    parts = {"checkpoint_path": small_cascade["checkpoint_path"], "micro_batch_size": 1, "updates": 1}
    (line,) = train(name, whole | parts)
    assert line["samples_hash"] == lines[0]["samples_hash"]
    assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)


@pytest.mark.bits
@pytest.mark.parametrize("name", represented_by("train_c", of=SETTINGS))
def test_an_update_that_is_not_finite_changes_nothing(small_cascade, baseline, name):
    whole, _ = baseline(name)
    given = whole | {"checkpoint_path": small_cascade["checkpoint_path"], "updates": 5}
    shutil.copytree(whole["checkpoint_path"], given["checkpoint_path"])
    before = files(given)

    class Broken(use_case(name)):
        def loss(self, inputs, random):
            return super().loss(_poisoned(inputs), random)

    lines = train(name, given, Broken)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[4]["loss"] is None  # as JSON has no other word for it
    after = files(given)
    for file, tensors in before.items():
        for key, tensor in tensors.items():
            assert torch.equal(after[file][key], tensor), (file, key)


def _poisoned(inputs):
    """The same inputs, with one number of the first floating-point tensor not a number."""
    parts = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    place = next(i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.is_floating_point())
    parts[place] = parts[place].clone()
    parts[place][(0,) * parts[place].dim()] = torch.nan
    return parts[0] if isinstance(inputs, torch.Tensor) else tuple(parts)


@pytest.mark.parametrize("name", represented_by("train_c", of=SETTINGS))
def test_two_processes_make_the_updates_of_one(settings, name, tmp_path):
    check_two_processes(settings, name, tmp_path, use_fsdp=True)


@pytest.mark.slow
def test_two_processes_with_whole_networks_make_the_updates_of_one(settings, tmp_path):
    check_two_processes(settings, "train_a", tmp_path, use_fsdp=False)


def check_two_processes(settings, name: str, tmp_path: Path, use_fsdp: bool) -> None:
    alone = settings_for_two(settings, name, tmp_path) | {"updates": 3, "save_every": 3}
    expected = train(name, alone)
    together = alone | {"experiment_id": "together", "use_fsdp": use_fsdp}
    launch_processes(2, member, name, together, versions.VERSIONS["mini"])
    check_equal(together, alone, expected)


def settings_for_two(settings, name: str, tmp_path: Path) -> dict:
    """Settings of a run that one process or two can make, named `alone`."""
    # A second bucket, sometimes in the same update.
    wide = (
        write_clips(tmp_path / "wide.tar", 6, first=100, size=(32, 96)) if name in OF_CLIPS
        else write_shard(tmp_path / "wide.tar", 6, (32, 96), first=100)
    )  # fmt: skip
    alone = settings(name, "alone", micro_batch_size=1, batch_size=2)
    if name.startswith("train_sd"):
        alone |= {"image_size": 128}  # a bucket three times as wide as high has sides of 64 px and more
    if name in NEEDS_WHOLE_BATCHES - {"train_a"}:
        return alone | {"micro_batch_size": 2, "batch_size": 4}
    return alone | {"webdataset_path": [alone["webdataset_path"], str(wide)], "multi_aspect_ratio": [1, 3]}


def check_equal(together: dict, alone: dict, expected: list[dict]) -> None:
    """Fail where a run has other metrics than those of the run `alone`, or other weights."""
    for line, other in zip(expected, read_metrics(together), strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        # Sums over processes have another order; in six updates, batch norms make more of it.
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    ours, theirs = files(together), files(alone)
    for file, tensors in theirs.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(ours[file][key], tensor, rtol=1e-3, atol=1e-3, msg=f"{file} {key}")


def member(
    name: str, settings: dict, mini: versions.Version, number: signal.Signals | None = None, after: int = 0
) -> None:
    """Make a run, to which a signal is sent while it makes the update behind `after`."""

    class Disturbed(use_case(name)):
        def loss(self, *args):
            if number is not None and self.update == after and self.processes.is_main:
                os.kill(os.getpid(), number)
            return super().loss(*args)

    versions.VERSIONS["mini"] = mini
    status = Disturbed(make_config(Disturbed.Config, settings)).run()
    assert status == (0 if number is None else STOPPED_EARLY)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - WITHOUT_COMPILING))
def test_compiled_blocks_make_the_same_updates(settings, name, monkeypatch):
    """Traced and differentiated as `torch.compile` does it; the code that it writes then takes minutes to build."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(use_case(name), "sample", lambda self, held_out: [])  # without gradients: traced once more
    plain = settings(name, "plain", updates=1, validation_samples=0)
    compiled = train(name, plain | {"experiment_id": "compiled", "compile": True})
    for line, other in zip(train(name, plain), compiled, strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", represented_by("train_vae", of=SETTINGS))
def test_a_second_run_of_the_same_experiment_is_refused(settings, name):
    kind, refused = use_case(name), []

    class StartedTwice(kind):
        def loss(self, *args):
            if not refused:
                with pytest.raises(UserError, match="another run") as found:
                    kind(make_config(kind.Config, given)).run()
                refused.append(found.value)
            return super().loss(*args)

    given = settings(name, "twice", updates=1, save_every=1)
    assert len(train(name, given, StartedTwice)) == len(refused) == 1
