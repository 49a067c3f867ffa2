"""The tower trainer: it learns, and leaves files that load by themselves."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from families.common.t5 import T5TextEncoder
from families.common.t5_tower import T5Tower
from modules.clip import image_tower, text_tower
from tests.warpcore.runs import train_here
from train.train_towers import TowersConfig, TrainTowers

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture
def settings(tmp_path):
    return {
        "experiment_id": "towers", "checkpoint_path": str(tmp_path),
        "webdataset_path": str(colours(tmp_path / "a.tar")),
        "updates": 60, "save_every": 60, "batch_size": 4, "image_size": 32, "num_workers": 0, "device": "cpu",
        "lr": 0.005, "words": ["a", "picture", *COLOURS], "tower_width": 16, "tower_heads": 2, "text_length": 6,
        "text_layers": 1, "image_layers": 1, "image_tower_size": 16, "image_tower_patch": 8,
    }  # fmt: skip


def colours(path: Path) -> Path:
    """A tar of four pictures, each of one colour, with its caption."""
    with tarfile.open(path, "w") as tar:
        for name, colour in COLOURS.items():
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
            for extension, data in {"png": buffer.getvalue(), "txt": f"a {name} picture".encode()}.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.integration
def test_pictures_find_their_captions_with_the_towers_that_a_run_leaves(settings):
    status, lines = train_here(settings, TrainTowers, TowersConfig)
    assert status == 0
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]
    folder = Path(settings["checkpoint_path"]) / "towers"
    assert (folder / "text_tower.safetensors").stat().st_size < 200_000
    text = text_tower(path=folder / "text_tower.safetensors", dtype=torch.float32)
    image = image_tower(path=folder / "image_tower.safetensors", dtype=torch.float32)
    captions = text.encode(*text.tokenize([f"a {name} picture" for name in COLOURS]))[1]
    pictures = torch.tensor(list(COLOURS.values()))[:, :, None, None].expand(-1, -1, 16, 16) / 255
    similarities = torch.cosine_similarity(image.encode(pictures)[:, None], captions[None], dim=-1)
    assert similarities.argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.integration
def test_a_t5_finds_them_too_and_its_file_is_an_encoder_of_transformers(settings):
    given = settings | {"text_encoder": "t5", "text_width": 24}
    status, lines = train_here(given, TrainTowers, TowersConfig)
    assert status == 0
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]
    folder = Path(settings["checkpoint_path"]) / "towers"
    encoder = T5TextEncoder.load(folder / "text_tower.safetensors", length=6)
    captions = ["a red picture", "a", "a blue picture picture picture picture, of wombats"]
    conditions = encoder(captions)
    assert conditions.lengths.tolist() == [4, 2, 6]
    tower = T5Tower(TowersConfig(**given).clip)
    tower.model.load_state_dict(encoder.model.state_dict())
    hidden, _ = tower(*tower.tokenize(captions))
    torch.testing.assert_close(conditions.hidden, hidden.detach() * conditions.mask[..., None])
    image = image_tower(path=folder / "image_tower.safetensors", dtype=torch.float32)
    assert image.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_a_t5_reads_words_that_it_does_not_know_as_unknown(settings):
    tokenizer = T5Tower(TowersConfig(**settings).clip).tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a green wombat").input_ids)
    assert pieces == ["▁a", "▁green", "▁", "<unk>", "</s>"]


def test_unknown_words_are_one_word(settings):
    tower = TrainTowers(TowersConfig(**settings)).build()["text"]
    ids, _ = tower.tokenize(["a red elephant", "a red giraffe"])
    assert torch.equal(*ids)
