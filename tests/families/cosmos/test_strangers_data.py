"""The published layout of data, with whatever people have in it, becomes a trained network and files for others."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from inference import text_to_image
from tests.caches import make_cache, write_pictures
from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.warpcore.runs import read_metrics, tiny_settings
from tools import build_dataset, export, index_dataset
from train.train_cosmos import TrainCosmos
from train.train_cosmos_lora import TrainCosmosLora
from warpcore.config import make_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("pipeline"))


def write_folder(folder: Path) -> None:
    """Good pictures of several kinds, shapes and captions, and four that are none: cut, empty, a text, no caption."""
    for name in ("images", "metas", "t5_xxl"):
        (folder / name).mkdir(parents=True)
    pictures = {
        "grey.jpg": Image.new("L", (40, 32), 90), "colour.jpeg": Image.new("RGB", (64, 64), "red"),
        "clear.png": Image.new("RGBA", (48, 48), (0, 255, 0, 40)), "palette.png": Image.new("P", (32, 90)),
        "wide.webp": Image.new("RGB", (600, 20), "blue"), "dot.png": Image.new("RGB", (1, 1)),
        "ink.jpg": Image.new("CMYK", (50, 40)), "UPPER.JPG": Image.new("RGB", (64, 48), "white"),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(folder / "images" / name)
        (folder / "metas" / f"{Path(name).stem}.txt").write_text(f"a picture of {name}", encoding="utf-8")
    (folder / "metas" / "dot.txt").write_text("", encoding="utf-8")
    (folder / "metas" / "wide.txt").write_text("a blue band " * 2500, encoding="utf-8")
    whole = (folder / "images" / "colour.jpeg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "empty.jpg").touch()
    (folder / "images" / "text.jpg").write_text("no picture", encoding="utf-8")
    (folder / "metas" / "lost.txt").write_text("a caption of nothing", encoding="utf-8")
    (folder / "t5_xxl" / "grey.pickle").write_bytes(b"never read")


def run(kind: type, settings: dict) -> Path:
    settings = {key: value for key, value in settings.items() if key in kind.Config.model_fields}
    assert kind(make_config(kind.Config, settings)).run() == 0
    return Path(settings["checkpoint_path"]) / settings["experiment_id"]


def draw(monkeypatch, folder: Path, *arguments: str) -> torch.Tensor:
    given = [
        "size=[32, 48]",
        "steps=2",
        'prompts=["a red circle", ""]',
        "device=cpu",
        f"output_path={folder}",
        "text_encoder_precision=float32",
    ]
    monkeypatch.setattr("sys.argv", ["text_to_image.py", *given, *arguments])
    text_to_image.main()
    return torch.tensor([list(Image.open(file).convert("RGB").tobytes()) for file in sorted(folder.glob("0*.png"))])


@pytest.fixture
def write(monkeypatch):
    """tools/export.py."""

    def write(form: str, source: Path, target: Path, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["export.py", form, str(source), str(target), *arguments])
        export.main()

    return write


@pytest.mark.slow
def test_a_stranger_s_folder_becomes_a_network_and_files_for_others(pipeline, tmp_path, monkeypatch, capsys, write):
    write_folder(tmp_path / "mine")
    build_dataset.main([str(tmp_path / "mine"), str(tmp_path / "shards")])
    told = capsys.readouterr().out
    for part in (
        "8 pictures",
        "cut.jpg",
        "empty.jpg",
        "text.jpg",
        "lost.txt",
        "grey.pickle",
        "a pickle, which can run",
    ):
        assert part in told, part
    index_dataset.main([str(tmp_path / "shards")])
    settings = tiny_settings(
        tmp_path, tmp_path / "shards", model_version="mini", generator_checkpoint_path=str(pipeline), updates=2,
        save_every=2, sample_steps=1, sample_count=1, image_size=32, multi_aspect_ratio=[1, 0.5], crop_mode="center",
        text_encoder_precision="float32", rank=2, ema_start_iters=None,
    )  # fmt: skip
    known = {key: value for key, value in settings.items() if key in TrainCosmos.Config.model_fields}
    cache = make_cache("train_cosmos", known, tmp_path / "cache")
    whole = run(TrainCosmos, settings | {"webdataset_path": str(cache), "experiment_id": "whole"})
    from_pictures = run(TrainCosmos, settings | {"experiment_id": "pictures"})
    for folder in (whole, from_pictures):
        assert json.loads((folder / "info.json").read_text(encoding="utf-8"))
    expected = draw(monkeypatch, tmp_path / "of_run", f"run={whole}")
    assert len(expected) == 2

    write("published", whole, tmp_path / "whole.pt", "export_dtype=float32")
    write("diffusers", whole, tmp_path / "folder", "export_dtype=float32")
    diffusers.CosmosTransformer3DModel.from_pretrained(tmp_path / "folder")
    beside = [f"{key}={pipeline}" for key in ("autoencoder_checkpoint_path", "text_encoder_checkpoint_path")]
    for number, place in enumerate(("whole.pt", "folder")):
        given = f"generator_checkpoint_path={tmp_path / place}"
        assert torch.equal(draw(monkeypatch, tmp_path / f"again{number}", given, *beside), expected)

    learned = {"webdataset_path": str(cache), "experiment_id": "lora", "lr": 0.1}
    lora = run(TrainCosmosLora, settings | learned)
    expected = draw(monkeypatch, tmp_path / "of_lora_run", f"run={lora}")
    for kind in ("lora", "lora-diffusers", "lora-comfyui", "lora-published"):
        file = tmp_path / f"{kind}.safetensors"
        write(kind, lora, file)
        assert load_file(file)
        given = [f"generator_checkpoint_path={pipeline}", f"lora=[{file}]"]
        found = draw(monkeypatch, tmp_path / f"of_{kind}", *given)
        assert (found - expected).abs().max() <= 1


def test_four_pictures_lose_no_epoch_and_start_no_workers_again(pipeline, tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures" / "0.tar", 4)
    seen, begun, plain = [], [], DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: begun.append(1) or plain(self))

    class Watched(TrainCosmos):
        def encode(self, batch, random):
            seen.extend(batch.keys)
            return super().encode(batch, random)

    settings = tiny_settings(
        tmp_path, tmp_path / "pictures", model_version="mini", generator_checkpoint_path=str(pipeline), updates=6,
        save_every=6, batch_size=2, sample_steps=1, sample_count=1, image_size=32, text_encoder_precision="float32",
    )  # fmt: skip
    run(Watched, settings)
    epochs = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    assert [sorted(epoch) for epoch in epochs] == [["00000", "00001", "00002", "00003"]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(begun) <= 1
    assert len(read_metrics(settings)) == 6
