"""Runs of the training scripts at small or published sizes with random weights: what the parts of `gpu.py` measure.

Nothing is downloaded: networks get seeded random weights where no file of theirs comes with the repository.
"""

import importlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.data import photographs, write_tars
from benchmarks.gpu_part import Bench, no_waiting
from families.cascade import versions
from families.stable_diffusion import versions as sd_versions
from modules.stage_c import StageC
from tools.demo_clips import MOTIONS
from tools.make_demo_dataset import make_demo_dataset
from warpcore.config import make_config
from warpcore.core import WarpCore

SCRIPTS: dict[str, dict] = {
    "train_c": {"clip_image_dropout": 0.5},
    "train_c_lora": {"module_filters": [".attn"], "rank": 4, "clip_image_dropout": 1.0},
    "train_c_controlnet": {
        "controlnet_blocks": [0, 2], "controlnet_filter": "CannyFilter", "clip_image_dropout": 1.0,
        "controlnet_filter_params": {"resize": 64},
    },
    "train_b": {},
    "train_b joint": {"train_encoder": True},
    "train_a": {"discriminator_start": 1, "discriminator_channels": 8},
    "train_encoder": {},
    "train_towers": {
        "words": ["a", "photograph", "number"], "tower_width": 16, "tower_heads": 2, "text_length": 6,
        "text_layers": 1, "image_layers": 1, "image_tower_size": 16, "image_tower_patch": 8,
    },
    "train_cosmos": {"text_encoder_precision": "float32"},
    "train_cosmos_lora": {"rank": 4, "text_encoder_precision": "float32"},
    "train_dit": {"class_getter": ["key", "lambda k: int(k) % 8"], "class_names": list("01234567")},
    "train_latte": {"num_classes": len(MOTIONS), "num_frames": 4, "frame_stride": 4},
    "train_nova": {
        "model_version": "mini-video", "text_encoder_precision": "float32", "num_frames": 5, "frame_stride": 4,
        "sample_groups": 2,
    },
    "train_nova classes": {
        "num_frames": 1, "sample_groups": 2, "class_getter": ["key", "lambda k: int(k) % 8"], "num_classes": 8,
    },
    "train_pixart": {"text_encoder_precision": "float32"},
    "train_pixart_lora": {"rank": 4, "text_encoder_precision": "float32"},
    "train_sd": {},
    "train_sd_lora": {"module_filters": ["to_q", "conv1"], "rank": 4},
    "train_stdit": {"text_encoder_precision": "float32", "num_frames": 5, "frame_stride": 4},
    "train_stdit 1.0": {
        "model_version": "mini-1.0", "text_encoder_precision": "float32", "num_frames": 3, "frame_stride": 8,
    },
    "train_stdit 1.1": {
        "model_version": "mini-1.1", "text_encoder_precision": "float32", "num_frames": 3, "frame_stride": 8,
    },
    "train_stdit_lora": {"text_encoder_precision": "float32", "num_frames": 5, "frame_stride": 4, "rank": 4},
    "train_video_vae": {
        "num_frames": 5, "base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "z_dim": 2,
        "discriminator_start": 1, "discriminator_channels": 8,
    },
    "train_vae": {
        "block_out_channels": [8, 16], "norm_num_groups": 2, "discriminator_start": 1,
        "discriminator_channels": 8,
    },
}  # fmt: skip
"""What each script needs beside the common settings; a word after the name is another way to run it."""


def use_case(name: str) -> type[WarpCore]:
    """The use case of a script in `SCRIPTS`."""
    module = importlib.import_module(f"train.{name.split()[0]}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return next(kind for kind in own if issubclass(kind, WarpCore))


def pictures(bench: Bench, count: int, side: int) -> Path:
    """A folder of tars with `count` photographs of about side^2 px and captions."""
    folder = bench.scratch / f"{count}_pictures_of_{side}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        write_tars(photographs(count, side**2, 1.5 * side**2), partial)
        partial.rename(folder)
    return folder


def clips(bench: Bench, count: int) -> Path:
    """A tar of clips of the moving demo set."""
    path = bench.scratch / f"{count}_clips.tar"
    if not path.exists():
        folder = bench.scratch / f"{count}_clips"
        make_demo_dataset(folder, count, video=True)
        with tarfile.open(partial := path.with_suffix(".partial"), "w") as tar:
            for file in sorted(folder.glob("*/*")):
                tar.add(file, file.relative_to(folder).as_posix(), recursive=False)
        partial.rename(path)
    return path


def mini_generator(bench: Bench) -> Path:
    """Weights of a mini Stage C that predicts something: random, also in the layers that start as zeros."""
    path = bench.scratch / "mini_stage_c.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        network = StageC(**versions.VERSIONS["mini"].stage_c)
        for parameter in network.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        save_file(network.state_dict(), path)
    return path


def mini_unet(bench: Bench) -> Path:
    """A folder with random weights of the mini Stable Diffusion's U-Net."""
    folder = bench.scratch / "mini_unet"
    if not folder.exists():
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        UNet2DConditionModel(**sd_versions.VERSIONS["mini"].unet).save_pretrained(folder)
    return folder


def mini_stage_b(bench: Bench) -> Path:
    """The shipped weights of the mini Stage B."""
    return versions.MINI.folder / "stage_b.safetensors"


STARTS: dict[str, Callable[[Bench], Path] | None] = {
    "train_sd": mini_unet, "train_cosmos": None, "train_dit": None, "train_latte": None, "train_pixart": None,
    "train_nova": None, "train_stdit": None,
    "train_b": mini_stage_b, "train_": mini_generator,
}  # fmt: skip
"""By the beginning of a script's name, what a mini starts from: networks that predict zeros at first do so in every
precision. None for a random start: that of Cosmos-Predict2 predicts something."""


def script_settings(bench: Bench, name: str, run: str, device: torch.device, **changes) -> dict:
    """Settings of two updates of a script: with mini networks in float32, if the changes say nothing else."""
    of_clips = use_case(name).takes_videos and SCRIPTS[name].get("num_frames") != 1
    every = {
        "experiment_id": run, "checkpoint_path": str(bench.scratch / "runs"), "model_version": "mini", "updates": 2,
        "webdataset_path": str(clips(bench, 8) if of_clips else pictures(bench, 8, 64)),
        "batch_size": 4, "image_size": 64, "num_workers": 0,
        "log_every": 1, "device": device.type, "lr": 1e-3, "seed": 3, "dtype": "float32", "allow_tf32": False,
        "crop_mode": "center",
    }  # fmt: skip
    if changes.get("model_version", "mini") == "mini":
        start = next(start for prefix, start in STARTS.items() if name.startswith(prefix))
        every |= {"generator_checkpoint_path": str(start(bench))} if start else {}
    common = {key: value for key, value in every.items() if key in use_case(name).Config.model_fields}
    return common | SCRIPTS[name] | changes


def train(bench: Bench, kind: type[WarpCore], settings: dict, status: int = 0, watched: bool = True) -> list[dict]:
    """Run a use case from scratch; the lines of its metrics. The second and later updates may not wait for the GPU."""

    class Watched(kind):
        def make_update(self, batches):
            if self.update == 0 or not watched:  # kernels are compiled and chosen in the first one
                return super().make_update(batches)
            with no_waiting(self.device):
                return super().make_update(batches)

    Watched.__name__ = kind.__name__
    torch.compiler.reset()
    found = Watched(make_config(kind.Config, settings)).run()
    if found != status:
        raise RuntimeError(f"the run ended with status {found} instead of {status}")
    return metrics(settings)


def fresh(settings: dict) -> dict:
    """The settings; what an earlier run of this name left is removed."""
    shutil.rmtree(Path(settings["checkpoint_path"]) / settings["experiment_id"], ignore_errors=True)
    return settings


def metrics(settings: dict) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = Path(settings["checkpoint_path"]) / settings["experiment_id"] / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_cache(bench: Bench, name: str, settings: dict) -> Path:
    """A cache of the features of a run's data, as tools/cache.py writes it."""
    from tools.cache import Caching

    out = bench.scratch / f"cache_{name.replace(' ', '_')}_{settings['model_version']}"
    if not out.exists():
        kind = use_case(name)
        config = make_config(kind.Config, settings)
        partial = out.with_suffix(".partial")
        with closing(Caching(kind(config), partial, "float32", 1, settings["batch_size"])) as caching:
            caching.run()
        partial.rename(out)
    return out


@contextmanager
def published_sizes(bench: Bench) -> Iterator[None]:
    """Inside, all sizes but mini find random weights of the networks around the trained one. They have the published
    sizes, except for the text and image towers, which have the published widths but one layer. With `tiny` nothing
    changes."""
    if bench.tiny:
        yield
        return
    from modules.clip import ClipSettings, ImageTower, TextTower
    from modules.effnet import EfficientNetEncoder
    from modules.previewer import Previewer
    from modules.stage_a import StageA

    folder = bench.scratch / "published"
    if not folder.exists():
        torch.manual_seed(0)
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        save_file(EfficientNetEncoder().state_dict(), partial / "effnet_encoder.safetensors")
        save_file(StageA().state_dict(), partial / "stage_a.safetensors")
        save_file(Previewer().state_dict(), partial / "previewer.safetensors")
        text = {"width": 1280, "heads": 20, "layers": 1, "context_length": 77}
        TextTower(ClipSettings(1280, text_cfg=text, words=["photograph"])).save(partial / "text.safetensors")
        image = {"width": 1024, "head_width": 64, "layers": 1, "image_size": 224, "patch_size": 14}
        ImageTower(ClipSettings(768, vision_cfg=image)).save(partial / "image.safetensors")
        partial.rename(folder)
    before = dict(versions.VERSIONS)
    for name in before.keys() - {"mini"}:
        versions.VERSIONS[name] = replace(
            before[name], folder=folder, text_tower=str(folder / "text.safetensors"),
            image_tower=str(folder / "image.safetensors"),
        )  # fmt: skip
    try:
        yield
    finally:
        versions.VERSIONS.update(before)


def built_on_device(kind: type[WarpCore]) -> type[WarpCore]:
    """A use case whose random weights are drawn on its device: 3.6 billion take minutes on a CPU."""

    class OnDevice(kind):
        def build(self):
            with self.device:
                return super().build()

    return OnDevice
