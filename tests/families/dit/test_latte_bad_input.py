"""What is wrong with the files, classes and caches that a Latte is given is named."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.dit import build
from families.dit.latte_class_to_image import LatteClassToImage
from families.dit.versions import MINI
from tests.caches import make_cache
from tests.clips import FPS, clip, write_clips
from tests.families.dit.classed import CLASSES, random_network, small_settings
from tests.families.dit.test_hostile_files import pixart, published
from tests.warpcore.data.tars import write_tar
from train.train_latte import TrainLatte
from warpcore.clips import encode_mp4
from warpcore.config import make_config
from warpcore.errors import UserError

FRAMES = 3


@pytest.fixture
def weights(small_mini, tmp_path) -> Path:
    """The network in the form in which Latte is published."""
    torch.save({"ema": random_network(num_frames=FRAMES).state_dict()}, tmp_path / "Latte.pt")
    return tmp_path / "Latte.pt"


def settings(folder: Path, data: Path, **changes) -> dict:
    return small_settings(folder, data, num_frames=FRAMES, autoencoder_frames=4) | changes


def start_with(weights: Path) -> None:
    """What a run does first with the weights that it is to begin with."""
    given = settings(weights.parent, weights.parent / "a.tar", generator_checkpoint_path=str(weights))
    build.dit(make_config(TrainLatte.Config, given), (32, 32))


def train(given: dict) -> None:
    assert TrainLatte(make_config(TrainLatte.Config, given)).run() == 0


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_file_that_is_cut_short_is_named(weights, tmp_path, kept):
    content = weights.read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"cut\.pt"):
        make_config(LatteClassToImage.Config, {"generator_checkpoint_path": str(cut), "classes": [1]})
    with pytest.raises(UserError, match=r"cut\.pt"):
        start_with(cut)


def test_a_file_of_a_run_that_is_cut_short_is_named(small_mini, tmp_path):
    save_file(random_network(num_frames=FRAMES).state_dict(), tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        start_with(cut)


OTHERS = {
    "anything": lambda: {"a": torch.zeros(3)},
    "PixArt": lambda: published(pixart()),
    "wider": lambda: random_network(num_frames=FRAMES, hidden_size=64).state_dict(),
    "deeper": lambda: random_network(num_frames=FRAMES, depth=4).state_dict(),
    "autoencoder": lambda: load_file(MINI / "autoencoder.safetensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_another_network_are_refused_by_name(small_mini, tmp_path, kind):
    torch.save(OTHERS[kind](), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt"):
        start_with(tmp_path / "weights.pt")


@pytest.mark.parametrize("wrong", [CLASSES, -1, "jumping"])
def test_a_class_that_the_network_has_not_is_not_drawn(weights, wrong):
    with pytest.raises(UserError, match=r"class 5 is outside of 0 to 4|class -1 is outside|'jumping' is no class"):
        LatteClassToImage(make_config(LatteClassToImage.Config, {
            "generator_checkpoint_path": str(weights), "classes": [wrong], "device": "cpu"}))  # fmt: skip


@pytest.mark.integration
def test_clips_of_a_class_outside_the_range_are_named_counted_and_replaced(small_mini, tmp_path, capfd):
    members = []
    for number, label in enumerate([0, 1, 900, 2, 3, 4]):
        members += [
            (f"{number}.mp4", encode_mp4(clip(number, (32, 32), FRAMES), FPS)),
            (f"{number}.cls", b"%d" % label),
        ]
    train(settings(tmp_path, write_tar(tmp_path / "a.tar", members), updates=3, sample_classes=[0]))
    assert "a.tar/2.cls: class 900 is outside of 0 to 4" in capfd.readouterr().err


@pytest.mark.integration
def test_a_cache_of_another_autoencoder_is_refused(small_mini, tmp_path):
    given = settings(tmp_path, write_clips(tmp_path / "data" / "a.tar", 4))
    cache = make_cache("train_latte", given, tmp_path / "cache")
    with safe_open(MINI / "autoencoder.safetensors", "pt") as file:
        about = file.metadata()
    tensors = load_file(MINI / "autoencoder.safetensors")
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + 1
    save_file(tensors, tmp_path / "other.safetensors", about)
    other = {"autoencoder_checkpoint_path": str(tmp_path / "other.safetensors"), "webdataset_path": str(cache)}
    with pytest.raises(UserError, match=r"other\.safetensors"):
        train(given | other)
