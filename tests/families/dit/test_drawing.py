"""What is drawn from, through inference/class_to_image.py: runs, averages, published files; and what is refused."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.common.family import CLASS_TO_IMAGE, TEXT_TO_IMAGE
from families.dit.class_to_image import DitClassToImage
from families.dit.exports import to_published
from families.dit.files import read_dit
from families.dit.versions import MINI
from families.registry import family_of, load_task
from inference.class_to_image import main
from modules.dit import DiT
from tests.caches import make_cache
from tests.families.dit.classed import CLASSES, SMALL, numbered, random_network, small_settings, write_classed
from train.train_dit import TrainDit
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

NAMES = ["red circle", "red star", "blue circle", "blue star", "green ring"]
DRAWN = {"steps": 2, "device": "cpu", "guidance": 3.0}


@pytest.fixture
def published(small_mini, tmp_path):
    """A file as DiT's are published: a bare mapping, whose width tells the heads."""
    network = random_network()
    torch.save(network.state_dict(), tmp_path / "any_name.pt")
    return tmp_path / "any_name.pt"


def draw(**given) -> list[torch.Tensor]:
    task = DitClassToImage(make_config(DitClassToImage.Config, DRAWN | given))
    return task.draw(task.labels, [7] * len(task.labels)).pictures


@pytest.mark.integration
def test_a_run_its_average_and_its_published_file_are_drawn_from(small_mini, tmp_path):
    data = write_classed(tmp_path / "a.tar", numbered(8))
    settings = small_settings(
        tmp_path, data, class_names=NAMES, ema_start_iters=1, ema_beta=0.5, save_every=1, updates=3, lr=0.1
    )
    assert TrainDit(make_config(TrainDit.Config, settings)).run() == 0
    run = tmp_path / "runs" / "run"
    assert family_of(run).name == "dit"
    average, plain = draw(run=[run], classes=["red star", 3]), draw(run=[run], classes=["red star", 3], use_ema=False)
    assert average[0].shape == (3, 32, 32)
    assert not torch.equal(average[0], plain[0])
    torch.testing.assert_close(average[1], draw(run=[run], classes=["blue star"])[0])
    to_published(run, tmp_path / "out.pt", [])
    for one, other in zip(average, draw(generator_checkpoint_path=tmp_path / "out.pt", classes=[1, 3]), strict=True):
        assert torch.equal(one, other)
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    DiT(2, num_classes=CLASSES, **SMALL).load_state_dict(whole, strict=True)
    assert torch.equal(
        whole["t_embedder.mlp.0.bias"], load_file(run / "generator_ema.safetensors")["t_embedder.mlp.0.bias"]
    )


def test_the_script_writes_pictures_that_say_what_they_show(published, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("# two\n3\n\n0\n")
    arguments = [
        f"generator_checkpoint_path={published}", "classes=[1]", f"class_file={tmp_path / 'classes.txt'}",
        "seeds=[4,5]", f"output_path={tmp_path / 'drawn'}", "steps=2", "device=cpu", "aspect_ratio=2", "image_size=48",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["class_to_image.py", *arguments])
    main()
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == [*(f"{i:04d}_class_{c}_{s}.png" for i, (c, s) in enumerate(
        [(1, 4), (1, 5), (3, 4), (3, 5), (0, 4), (0, 5)])), "grid.png"]  # fmt: skip
    picture = Image.open(tmp_path / "drawn" / "0002_class_3_4.png")
    assert picture.size == (64, 32)
    assert (picture.text["class"], picture.text["seed"]) == ("class 3", "4")
    assert json.loads(picture.text["settings"])["steps"] == 2


def test_a_seed_gives_the_same_picture_whatever_else_is_drawn(published):
    alone = draw(generator_checkpoint_path=published, classes=[2])
    together = draw(generator_checkpoint_path=published, classes=[4, 2], batch_size=1)
    torch.testing.assert_close(together[1], alone[0])


@pytest.mark.parametrize(
    ("arguments", "size"),
    [(["--resolution", "480p", "--aspect-ratio", "16:9"], (480, 848)), (["resolution=256"], (256, 256)),
     (["--resolution=144p", "--aspect-ratio=1:1"], (192, 192)), (["--image-size", "96"], (96, 96)),
     (["--size", "[480, 848]"], (480, 848)), ([], (32, 32))],
    ids=str,
)  # fmt: skip
def test_the_size_can_be_said_as_in_the_published_program(published, arguments, size):
    _, config = load_task(CLASS_TO_IMAGE, [f"generator_checkpoint_path={published}", "classes=[1]", *arguments])
    assert config.size_px == size


@pytest.mark.parametrize("sampler", ["iddpm", "ddim", "dpm-solver", "ddpm"])
def test_samplers_differ_and_guidance_counts(published, sampler):
    given = {"generator_checkpoint_path": published, "classes": [2], "sampler": sampler, "steps": 4}
    guided, plain = draw(**given)[0], draw(**given, guidance=1)[0]
    assert guided.isfinite().all()
    assert not torch.equal(guided, plain)


def test_files_of_open_sora_s_shapes_are_read(published, tmp_path):
    state = torch.load(published, weights_only=True)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, None]
    state["pos_embed_spatial"], state["pos_embed_temporal"] = state.pop("pos_embed"), torch.zeros(1, 1, 32)
    torch.save(state, tmp_path / "sora.pt")
    assert read_dit(tmp_path / "sora.pt", "x").config == read_dit(published, "x").config
    assert torch.equal(
        draw(generator_checkpoint_path=tmp_path / "sora.pt", classes=[1])[0],
        draw(generator_checkpoint_path=published, classes=[1])[0],
    )


def test_files_are_known_by_their_tensors(published, tmp_path):
    assert family_of(published).name == "dit"
    kind, config = load_task(CLASS_TO_IMAGE, [f"generator_checkpoint_path={published}", "classes=[1]"])
    assert kind is DitClassToImage
    assert (config.num_classes, config.learn_sigma, config.model_version) == (CLASSES, True, "mini")
    named = "is of DiT, which does not do this: text to image. It has inference/class_to_image.py"
    with pytest.raises(UserError, match=re.escape(named)):
        load_task(TEXT_TO_IMAGE, [f"generator_checkpoint_path={published}", "prompts=a"])


@pytest.mark.parametrize(
    ("key", "message"),
    [("guidance_channels=99", "guidance_channels: 99 of [0-9]+ channels: write fewer"),
     ("resolution=4k", "found '4k', but write the height of a picture of 16:9, such as 480p")],
)  # fmt: skip
def test_what_no_picture_can_have_is_refused_in_words(published, key, message):
    with pytest.raises(ConfigError, match=message):
        load_task(CLASS_TO_IMAGE, [f"generator_checkpoint_path={published}", "classes=[1]", key])


BROKEN = {
    "another network": (lambda state: {"a": torch.zeros(2)}, "holds no DiT: x_embedder.proj.weight is missing"),
    "a missing tensor": (
        lambda state: {name: t for name, t in state.items() if name != "blocks.1.attn.qkv.bias"},
        "blocks.1.attn.qkv.bias is missing in the file",
    ),
    "another width": (
        lambda state: state | {"x_embedder.proj.weight": torch.zeros(40, 16, 1, 1)}, "but one of 40; published are",
    ),
    "an odd shape": (lambda state: state | {"x_embedder.proj.weight": torch.zeros(4)}, "is of the shape"),
    "a billion blocks": (lambda state: state | {"blocks.999999999.x": torch.zeros(1)}, "its config is none of DiT"),
    "not numbers": (
        lambda state: state | {"t_embedder.mlp.0.bias": torch.full((32,), torch.nan)}, "mlp.0.bias holds NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_is_not_right_is_one_clear_error(published, tmp_path, what):
    change, message = BROKEN[what]
    torch.save(change(torch.load(published, weights_only=True)), tmp_path / "broken.pt")
    with pytest.raises(UserError, match=message):
        draw(generator_checkpoint_path=tmp_path / "broken.pt", classes=[1])


@pytest.mark.parametrize("name", ["autoencoder", "t5"])  # files that say numbers of their own
def test_a_file_of_another_network_is_called_that(name):
    with pytest.raises(UserError, match=f"{name}.safetensors holds no DiT: x_embedder.proj.weight is missing"):
        read_dit(MINI / f"{name}.safetensors", "generator_checkpoint_path")


def test_a_truncated_file_and_one_with_code_are_one_clear_error(published, tmp_path):
    content = published.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    torch.save({"x_embedder.proj.weight": np.float64(1), "args": print}, tmp_path / "code.pt")
    for name, message in {"cut.pt": "damaged, or no PyTorch file|damaged", "code.pt": "holds code"}.items():
        with pytest.raises(UserError, match=message):
            draw(generator_checkpoint_path=tmp_path / name, classes=[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [({"classes": [CLASSES]}, r"class 5 is outside of 0 to 4"), ({"classes": ["red star"]}, "'red star' is no class"),
     ({"classes": [1], "size": [32, 40]}, "size: 32 x 40 px .*multiples of 16 px"),
     ({"classes": [1], "size": [32, 32], "image_size": 32}, "image_size and size all say the size of pictures"),
     ({"classes": [1], "size": [32, 32], "aspect_ratio": 2}, "size and aspect_ratio both say the shape"),
     ({"classes": [1], "resolution": "480x640"}, "resolution"), ({"classes": [1], "resolution": "0p"}, "resolution"),
     ({"classes": [1], "num_classes": 7}, "has num_classes: 5, and the config 7; write num_classes: 5"),
     ({"classes": [1], "learn_sigma": False}, "has learn_sigma: true, and the config false"),
     ({"classes": [1], "model_version": "XL/2"}, "is a DiT-mini; write model_version: mini"),
     ({"classes": [1], "autoencoder_checkpoint_path": "absent"}, "absent"),
     ({"classes": []}, "nothing to draw: give classes or class_file"),
     ({"classes": [1], "learn_sigma": False, "sampler": "iddpm"}, "iddpm needs a network that learned variances")],
)  # fmt: skip
def test_what_does_not_fit_the_weights_is_refused(published, given, message):
    with pytest.raises(UserError, match=message):
        draw(generator_checkpoint_path=published, **given)


@pytest.mark.integration
def test_a_cache_of_another_autoencoder_is_refused(small_mini, tmp_path):
    given = small_settings(tmp_path, write_classed(tmp_path / "data" / "a.tar", numbered(4)))
    cache = make_cache("train_dit", given, tmp_path / "cache", "--features", "latents")
    state = load_file(small_mini.autoencoder)
    with safe_open(small_mini.autoencoder, "pt") as file:
        about = file.metadata()
    state["encoder.conv_in.bias"] += 1
    save_file(state, tmp_path / "other.safetensors", about)
    settings = given | {
        "webdataset_path": str(cache),
        "autoencoder_checkpoint_path": str(tmp_path / "other.safetensors"),
    }
    with pytest.raises(UserError, match="the weights of the autoencoder network are"):
        TrainDit(make_config(TrainDit.Config, settings)).run()
