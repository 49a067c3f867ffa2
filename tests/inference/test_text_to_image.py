"""Pictures from a training run: seeds, sizes, files that say how they were made, and clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from families.cascade.inference import DrawingSettings
from families.cascade.sampling import Cascade
from families.common.pictures import read_picture, to_pictures
from inference.text_to_image import main
from tests.tiers import represented_by
from train.train_c import TrainStageC
from warpcore.checkpoint import CheckpointError
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.outputs import free_folder
from warpcore.pictures import read_metadata

pytestmark = pytest.mark.integration


@pytest.fixture
def run(small_cascade):
    settings = small_cascade | {"updates": 2, "ema_start_iters": 1, "ema_beta": 0.0}
    TrainStageC(make_config(TrainStageC.Config, settings)).run()
    return f"{settings['checkpoint_path']}/{settings['experiment_id']}"


@pytest.fixture
def draw(monkeypatch, tmp_path, run, drawing_cascade):
    def draw(*arguments: str) -> dict[str, np.ndarray]:
        folder = free_folder(str(tmp_path / "pictures"))
        fixed = ["device=cpu", "image_size=64", "steps=2", "stage_b_steps=2", f"output_path={folder}"]
        monkeypatch.setattr("sys.argv", ["text_to_image.py", "--run", run, *fixed, *arguments])
        main()
        return {path: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}

    return draw


def single(pictures: dict) -> np.ndarray:
    (path,) = (path for path in pictures if path.name != "grid.png")
    return pictures[path].astype(int)


@pytest.mark.parametrize("stages", [[], ["preview=true"]])
def test_a_seed_gives_the_same_picture_whatever_is_drawn_beside_it(draw, stages):
    together = draw("prompts=[w1 w2, picture w3]", "seeds=[3, 4]", "batch_size=3", *stages)
    assert len(together) == 5
    assert any(path.name == "grid.png" for path in together)
    alone = single(draw("--prompts", "picture w3", "--seeds", "4", *stages))
    ours = next(picture for path, picture in together.items() if path.name.startswith("0003_picture_w3_4"))
    assert np.abs(alone - ours).max() <= 1
    other = next(picture for path, picture in together.items() if path.name.startswith("0002_"))
    assert np.abs(alone - other).max() > 1


@pytest.mark.parametrize("sampler", represented_by("ddpm", of=("ddpm", "ddim", "lcm", "dpmpp_2m")))
def test_pictures_have_the_size_asked_for_and_say_how_they_were_made(draw, sampler, capsys):
    pictures = draw('prompts=["w1"]', "size=[64, 90]", f"sampler={sampler}", f"stage_b_sampler={sampler}", "seeds=[7]")
    assert single(pictures).shape == (64, 90, 3)
    about = read_metadata(next(iter(pictures)))
    assert (about["prompt"], about["seed"]) == ("w1", "7")
    settings = json.loads(about["settings"])
    assert settings["steps"] == settings["stage_b_steps"] == 2
    assert settings["size"] == [64, 90]
    assert settings["generator_checkpoint_path"].endswith("generator_ema.safetensors")
    assert "peak memory: " in capsys.readouterr().out


def test_the_picture_is_what_the_stages_make_one_after_another(draw, run, drawing_cascade):
    cascade = Cascade(make_config(DrawingSettings, {"run": run, "device": "cpu", "stage_b_steps": 2}))
    text = cascade.read(["w1", "w2"])
    sides = [{name: part[i : i + 1] for name, part in text.items()} for i in range(2)]
    latents = cascade.draw_c(*sides, (64, 64), [3], steps=2, guidance=3.0, guidance_rescale=0.7, shift=2.0)
    pooled = [side["clip_text_pooled"] for side in sides]
    expected = cascade.decode(cascade.draw_b(latents, *pooled, [(64, 64)], [3]), [(64, 64)])
    pictures = draw("--prompts", "w1", "--negative_prompt", "w2", "--seeds", "3", "guidance=3", "shift=2")
    assert np.abs(single(pictures) - to_pictures(expected[0][None])[0]).max() <= 1


@pytest.mark.bits
def test_without_stage_b_the_previewer_draws_and_says_so(draw, tmp_path, capsys):
    whole = single(draw('prompts=["w1"]'))
    assert "previewer" not in capsys.readouterr().out
    preview = single(draw('prompts=["w1"]', "preview=true"))
    assert "drawn by the previewer, which is coarser than the full cascade.\n" in capsys.readouterr().out
    (tmp_path / "stage_b.safetensors").unlink()
    assert np.array_equal(single(draw('prompts=["w1"]')), preview)
    assert "there are no weights of Stage B (stage_b_checkpoint_path)" in capsys.readouterr().out
    assert preview.shape == whole.shape
    assert np.abs(whole - preview).max() > 1


def test_weights_say_what_they_are_whatever_the_config_has_become(draw, run, small_cascade, caplog):
    settings = small_cascade | {"updates": 3, "ema_start_iters": None}
    with pytest.raises(CheckpointError, match="diffusion_target was epsilon and is now v"):
        TrainStageC(make_config(TrainStageC.Config, settings | {"diffusion_target": "v"})).run()
    TrainStageC(make_config(TrainStageC.Config, settings)).run()
    assert "the average of the weights ends with update 2" in caplog.text
    config = Path(run) / "config.yaml"
    config.write_text(config.read_text().replace("diffusion_target: epsilon", "diffusion_target: v"))
    about = json.loads(read_metadata(next(iter(draw('prompts=["w1"]'))))["settings"])
    assert about.get("diffusion_target", "epsilon") == "epsilon"
    assert about["generator_checkpoint_path"].endswith("generator.safetensors")
    assert "is of update 2 and generator.safetensors of 3: taking the latter" in caplog.text


def test_drawings_are_not_written_over_unasked(draw, tmp_path, monkeypatch):
    first = draw('prompts=["w1"]', "preview=true", f"output_path={tmp_path / 'mine'}")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    again = ["preview=true", "seeds=[5]", f"output_path={tmp_path / 'mine'}"]
    with pytest.raises(UserError, match=r"mine/grid\.png is there already: give another output_path, or write overwr"):
        draw('prompts=["w2"]', *again)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    draw('prompts=["w2"]', "overwrite=true", *again)
    assert (tmp_path / "mine/grid.png").read_bytes() != before[tmp_path / "mine/grid.png"]
    assert not first  # the default folder of this fixture


@pytest.fixture
def picture(tmp_path):
    """Makes a file with a landscape picture."""

    def picture(name: str, seed: int):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 64)).save(tmp_path / name)
        return tmp_path / name

    return picture


def test_a_variation_depends_on_what_the_picture_shows_and_has_its_shape(draw, picture):
    first, second = (single(draw("--image", str(picture(f"{seed}.png", seed)))) for seed in (1, 2))
    assert first.shape == (52, 78, 3)  # the area of 64 x 64
    assert np.abs(first - second).max() > 1


def test_a_picture_to_start_from_is_found_in_the_noised_latents(draw, picture, monkeypatch):
    seen = {}

    def draw_c(self, conditions, unconditional, size, seeds, start=None, **sampling):
        seen.update(start=start, conditions=conditions, **sampling)
        return draw_c_before(self, conditions, unconditional, size, seeds, start, **sampling)

    draw_c_before = Cascade.draw_c
    monkeypatch.setattr(Cascade, "draw_c", draw_c)
    file = picture("a.png", 1)
    near, far = (single(draw("--image", str(file), f"noise_level={level}", "size=[64, 96]")) for level in (0.1, 0.8))
    assert near.shape == far.shape == (64, 96, 3)
    assert np.abs(near - far).max() > 1
    assert seen["noise_level"] == 0.8
    assert "clip_img" not in seen["conditions"]
    cascade = Cascade(make_config(DrawingSettings, {"model_version": "mini", "device": "cpu"}))
    torch.testing.assert_close(seen["start"], cascade.encode([read_picture(file)], [(4, 6)])[0])


def test_a_mistake_is_named(draw, tmp_path, picture):
    (tmp_path / "text.png").write_text("not pixels")
    for words, *arguments in (
        ("nothing to draw",),
        ("prompt_file: nowhere does not exist", "prompt_file=nowhere"),
        ("is no training run", 'prompts=["w1"]', f"run={tmp_path}"),
        ("image: nowhere.png does not exist", "--image", "nowhere.png"),
        ("text.png cannot be read as a picture: it is of no known format", "--image", str(tmp_path / "text.png")),
        ("give image too", 'prompts=["w1"]', "noise_level=0.5"),
        ("noise_level 0 would draw nothing", "--image", str(picture("a.png", 1)), "noise_level=0"),
        ("b.safetensors does not exist", 'prompts=["w1"]', f"stage_b_checkpoint_path={tmp_path / 'b.safetensors'}"),
        ("stage_b_checkpoint_path: ", "prompts=w1", f"stage_b_checkpoint_path={tmp_path / 'previewer.safetensors'}"),
        ("less than 16 px", 'prompts=["w1"]', "size=[8, 64]"),
        ("size: found", 'prompts=["w1"]', "size=[0, 64]"),
        ("but aspect_ratio has 0, which is no ratio", 'prompts=["w1"]', "aspect_ratio=0"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, UserError)) as error:
            draw(*arguments)
        assert words in str(error.value)
