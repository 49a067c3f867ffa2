"""Writes the old files with the Warpcore that stands first on PYTHONPATH: a checkout of an old commit.

    cd CHECKOUT && PYTHONPATH=$PWD python .../tests/legacy/write.py OUT

OUT gets `files.tar.xz`, a folder with data, weights and runs that name each other by relative paths; `expected.json`,
what the runs, each stopped half-way, did where nothing stopped them; and `times.json`, when each tar of data was last
changed, which old fingerprints and indexes hold.
"""

import importlib
import io
import itertools
import json
import logging
import os
import shutil
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import numpy as np
import torch
import yaml
from moto.server import ThreadedMotoServer
from old_cascade import BPE, BUCKET, DRAWINGS, DRAWN, SIZES, TEXT, WEIGHTS, WORDS, use, write_bpe_tower
from PIL import Image
from safetensors.torch import save_file

TIME_NS = 1_700_000_000_123_456_789
"""When the data was last changed."""
SHAPES = ((64, 64), (64, 96), (48, 64))
"""(H, W) in px of the pictures, in turn."""
QUOTED = ("a “quoted” picture", "don’t w1", "w2 &amp; w3", "a ﬁne picture", "picture w4 — w5", "w6…")
KEPT = ("update", "loss", "raw_loss", "samples_hash", "validation_loss", "validation_loss_ema")


@dataclass
class Run:
    """A training: its script (a module with a use case), and its config."""

    script: str
    use_case: str
    config: dict = field(default_factory=dict)
    half: int = 2
    updates: int = 4

    def start(self, updates: int, **changes) -> None:
        use_case = getattr(importlib.import_module(self.script), self.use_case)
        from warpcore.config import make_config

        status = use_case(make_config(use_case.Config, self.config | {"updates": updates} | changes)).run()
        assert status == 0, status

    @property
    def place(self) -> Path:
        return Path(str(self.config["checkpoint_path"])) / self.config["experiment_id"]


COMMON = {
    "checkpoint_path": "runs", "batch_size": 4, "num_workers": 0, "device": "cpu", "lr": 0.01, "log_every": 1,
    "save_every": 2, "keep_last": 1,
}  # fmt: skip
TINY = COMMON | {"image_size": 16, "webdataset_path": "data", "dropout": 0.1}
CASCADE = COMMON | {
    "model_version": "mini", "webdataset_path": "data/a.tar", "image_size": 64, "clip_image_dropout": 1.0,
    "caption_dropout": 0.2, "generator_checkpoint_path": "weights/generator.safetensors", "sample_steps": 2,
}  # fmt: skip
STAGE_B = {key: value for key, value in CASCADE.items() if key != "clip_image_dropout"} | {
    "generator_checkpoint_path": "weights/stage_b.safetensors", "validation_samples": 2,
}  # fmt: skip
LORA = CASCADE | {"module_filters": [".attn"], "rank": 2}
TOKENS = LORA | {"train_tokens": [["[dog]", "^w1</w>"], ["^w2</w>", None]], "caption_templates": ["{caption} [dog]"]}
AVERAGED = {"ema_start_iters": 1, "ema_beta": 0.9, "validation_samples": 2}
BUCKETS = {"multi_aspect_ratio": [1, 1.5], "crop_mode": "random"}
CONTROL = {"controlnet_blocks": [0, 2], "controlnet_filter": "CannyFilter", "controlnet_filter_params": {"resize": 64}}


def tiny(name: str, **changes) -> Run:
    return Run("tests.warpcore.tiny", "Denoiser", TINY | {"experiment_id": name} | changes)


def stage_c(name: str, **changes) -> Run:
    return Run("train.train_c", "TrainStageC", CASCADE | {"experiment_id": name} | changes)


def lora(name: str, base: dict = LORA, **changes) -> Run:
    return Run("train.train_c_lora", "TrainLora", base | {"experiment_id": name} | changes)


RUNS = [
    tiny("tiny", backup_every=2, **AVERAGED),
    tiny("held_out", webdataset_path="data/a.tar", validation_path="data/b.tar"),
    tiny("home", checkpoint_path="~/runs"),
    tiny("linked", webdataset_path=["links/latest.tar", "data/b.tar"]),
    tiny("doubled", webdataset_path=["links/latest.tar", "data/a.tar"]),
    tiny("repeated_keys", webdataset_path="repeated/r.tar"),
    stage_c("stage_c", adaptive_loss_weight=True, offset_noise=0.1, webdataset_path="data", **BUCKETS, **AVERAGED,
            stage_a_checkpoint_path="weights/stage_a.safetensors"),
    stage_c("image_condition", clip_image_dropout=0.5),
    stage_c("v", diffusion_target="v"),
    stage_c("min_snr", loss_weight="min_snr"),
    stage_c("on_a_v_base", generator_checkpoint_path="runs/v/generator.safetensors"),
    stage_c("quotes", webdataset_path="quotes/q.tar", clip_text_model_name=str(BPE)),
    stage_c("cached", webdataset_path="cache", clip_image_dropout=0.5, **BUCKETS),
    stage_c("cached_bpe", webdataset_path="cache_bpe", clip_text_model_name=str(BPE)),
    stage_c("cached_quotes", webdataset_path="cache_quotes", clip_text_model_name=str(BPE)),
    Run("train.train_b", "TrainStageB", STAGE_B | {"experiment_id": "stage_b_x0", "diffusion_target": "x0"}),
    lora("lora", TOKENS, ema_start_iters=1, ema_beta=0.9, validation_samples=2, alpha=1.0),
    lora("lora_everywhere", module_filters=["."]),
    lora("lora_masked", masked_loss=True),
    lora("lora_from_file", lora_checkpoint_path="runs/lora_masked/lora.safetensors", alpha=1.0, rank_stabilised=True),
    lora("lora_on_a_v_base", generator_checkpoint_path="runs/v/generator.safetensors"),
    Run("train.train_c_controlnet", "TrainControlNet",
        CASCADE | CONTROL | {"experiment_id": "controlnet", "validation_samples": 2}),
]  # fmt: skip
CACHES = {
    "cache": CASCADE | BUCKETS | {"clip_image_dropout": 0.5, "webdataset_path": "data"},
    "cache_bpe": CASCADE | {"clip_text_model_name": str(BPE)},
    "cache_quotes": CASCADE | {"webdataset_path": "quotes/q.tar", "clip_text_model_name": str(BPE)},
}
ON_S3 = tiny("tiny", checkpoint_path=f"s3://{BUCKET}/runs", webdataset_path=f"s3://{BUCKET}/data",
             scratch_path="scratch", **AVERAGED)  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    torch.set_num_threads(1)
    use()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_weights()
        write_data()
        index()
        for name, settings in CACHES.items():
            make_cache(name, settings)
        expected = {run.place.as_posix(): train(run) for run in RUNS}
        expected[f"s3://{BUCKET}/runs/tiny"] = train_on_s3(ON_S3)
        export()
        for name, arguments in DRAWINGS.items():
            draw(name, arguments)
        BPE.unlink()
        times = {str(path): path.stat().st_mtime_ns for path in sorted(Path().rglob("*.tar"))}
        with tarfile.open(out / "files.tar.xz", "w:xz", preset=9) as tar:
            tar.add(".", filter=_ownerless)
        os.chdir(out)
    for name, content in (("expected", expected), ("times", times)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _ownerless(info: tarfile.TarInfo) -> tarfile.TarInfo:
    return info.replace(uid=0, gid=0, uname="", gname="", deep=False)


# --- what runs start from


def write_weights() -> None:
    from modules.clip import ClipSettings, ImageTower, TextTower
    from modules.effnet import EfficientNetEncoder
    from modules.previewer import Previewer
    from modules.stage_a import StageA
    from modules.stage_b import StageB
    from modules.stage_c import StageC

    WEIGHTS.mkdir()
    torch.manual_seed(0)
    networks = {
        "generator": StageC(**SIZES.stage_c), "stage_b": StageB(**SIZES.stage_b), "stage_a": StageA(**SIZES.stage_a),
        "effnet_encoder": EfficientNetEncoder(**SIZES.encoder), "previewer": Previewer(**SIZES.previewer),
    }  # fmt: skip
    for name, network in networks.items():
        state = network.state_dict()
        for key, tensor in state.items():  # as if trained: layers that start as zeros would hide mistakes
            if tensor.is_floating_point() and not tensor.any() and "running" not in key:
                state[key] = torch.randn(tensor.shape) / max(1, tensor[0].numel()) ** 0.5 / 4
        save_file(state, WEIGHTS / f"{name}.safetensors")
    TextTower(ClipSettings(embed_dim=16, text_cfg=TEXT, words=WORDS)).save(SIZES.text_tower)
    vision = {"width": 16, "head_width": 8, "layers": 1, "image_size": 16, "patch_size": 8}
    ImageTower(ClipSettings(embed_dim=8, vision_cfg=vision)).save(SIZES.image_tower)
    write_bpe_tower()
    settings = {"model_version": "mini", "generator_checkpoint_path": "weights/generator.safetensors"}
    (WEIGHTS / "drawing.yaml").write_text(yaml.safe_dump(settings))
    (WEIGHTS / "control.png").write_bytes(picture(99, (64, 64)))


def picture(number: int, shape: tuple[int, int]) -> bytes:
    """Coarse squares of random colours, which take few bytes."""
    squares = np.random.default_rng(number).integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(squares.repeat(8, axis=0).repeat(8, axis=1)).save(content, "PNG")
    return content.getvalue()


def write_data() -> None:
    def members(number: int, caption: str, key: str | None = None) -> list[tuple[str, bytes]]:
        of_sample = {
            "png": picture(number, SHAPES[number % 3]), "txt": caption.encode(), "json": b'{"score": %d}' % number,
        }  # fmt: skip
        return [(f"{key or f'{number:04d}'}.{extension}", content) for extension, content in of_sample.items()]

    for name, first in (("data/a", 0), ("data/b", 8)):
        rows = [members(number, f"picture w{number % 7}") for number in range(first, first + 8)]
        write_tar(Path(f"{name}.tar"), rows)
    rows = [members(20 + number, caption) for number, caption in enumerate(QUOTED)]
    write_tar(Path("quotes/q.tar"), rows)
    first, *others, again = (members(number, f"picture w{number % 7}") for number in range(40, 48))
    renamed = [(name.replace("0047", "0040"), content) for name, content in again]
    write_tar(Path("repeated/r.tar"), [first, *others, renamed])
    Path("links").mkdir()
    os.symlink("../data/a.tar", "links/latest.tar")


def write_tar(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in itertools.chain(*samples):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    os.utime(path, ns=(TIME_NS, TIME_NS))


def index() -> None:
    from warpcore.data.catalog import index_shards, write_manifests
    from warpcore.data.shards import resolve_sources

    for folder in ("data", "quotes", "repeated"):
        (source,) = resolve_sources(folder)
        write_manifests(source.shards, dict(index_shards(source.shards)))


def make_cache(name: str, settings: dict) -> None:
    from tools import cache

    cache.TIMED_SAMPLES = 8
    config = Path("configs", f"{name}.yaml")
    config.parent.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(settings | {"experiment_id": name, "updates": 1}))
    import cascade

    script = Path(cascade.__file__).parents[1] / "train" / "train_c.py"
    cache.main([str(script), str(config), name])
    (Path(name) / ".lock").unlink(missing_ok=True)


# --- runs


def train(run: Run) -> dict:
    """Train half of a run, which stays, and all of it elsewhere; returns what that did."""
    name, config = run.config["experiment_id"], Path("configs", f"{run.config['experiment_id']}.yaml")
    config.write_text(yaml.safe_dump(run.config | {"updates": run.updates}, sort_keys=False))
    run.start(run.updates, checkpoint_path="whole")
    lines = read_metrics(Path("whole", name))
    shutil.rmtree("whole")
    run.start(run.half)
    assert read_metrics(run.place) == lines[: run.half], name
    (run.place / ".lock").unlink(missing_ok=True)
    return {"script": run.script, "use_case": run.use_case, "half": run.half, "lines": lines}


def read_metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT if key in line} for line in lines]


def train_on_s3(run: Run) -> dict:
    with s3() as client:
        for path in ("a.tar", "b.tar"):
            client.put_object(Bucket=BUCKET, Key=f"data/{path}", Body=Path("data", path).read_bytes())
        run.start(run.updates, checkpoint_path="whole")
        lines = read_metrics(Path("whole", "tiny"))
        run.start(run.half)
        for entry in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
            path = Path("s3", entry["Key"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())
    for folder in ("scratch", "whole"):
        shutil.rmtree(folder)
    return {"script": run.script, "use_case": run.use_case, "half": run.half, "lines": lines}


@contextmanager
def s3():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    server.stop()


def export() -> None:
    """LoRA files in other formats; the tokens of the second are a file beside it."""
    from tools import export

    for run, kind, name in (
        ("lora_masked", "comfyui", "comfyui.safetensors"), ("lora_masked", "peft", "peft"),
        ("lora_masked", "reference", "reference.safetensors"), ("lora", "comfyui", "tokens/lora.safetensors"),
    ):  # fmt: skip
        export.export_lora(kind, Path(f"runs/{run}/lora.safetensors"), Path(f"exports/{name}"), [])


def draw(name: str, arguments: list[str]) -> None:
    from inference import text_to_image

    before, sys.argv = sys.argv, ["text_to_image.py", *arguments, *DRAWN, "--output_path", "drawn"]
    text_to_image.main()
    sys.argv = before
    Path("drawings").mkdir(exist_ok=True)
    (drawn,) = Path("drawn").glob("0000_*.png")
    drawn.rename(f"drawings/{name}.png")
    shutil.rmtree("drawn")


if __name__ == "__main__":
    main()
