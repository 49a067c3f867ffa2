"""Pictures from a training run: seeds, sizes, files that say how they were made, and clear refusals."""

import numpy as np
import pytest
from PIL import Image

from inference.text_to_image import main
from train.train_c import TrainStageC
from warpcore.config import ConfigError, make_config
from warpcore.pictures import read_metadata


@pytest.fixture
def run(small_cascade):
    settings = small_cascade | {"updates": 2, "ema_start_iters": 1, "ema_beta": 0.0}
    TrainStageC(make_config(TrainStageC.Config, settings)).run()
    return f"{settings['checkpoint_path']}/{settings['experiment_id']}"


@pytest.fixture
def draw(monkeypatch, tmp_path, run):
    def draw(*arguments: str) -> dict[str, np.ndarray]:
        folder = tmp_path / f"pictures{len(list(tmp_path.iterdir()))}"
        arguments = [f"run={run}", f"output_path={folder}", "device=cpu", "image_size=64", "steps=2", *arguments]
        monkeypatch.setattr("sys.argv", ["text_to_image.py", *arguments])
        main()
        return {path: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}

    return draw


def test_a_seed_gives_the_same_picture_whatever_is_drawn_beside_it(draw):
    together = draw("prompts=[w1 w2, picture w3]", "seeds=[3, 4]", "batch_size=3")
    assert len(together) == 5
    assert any(path.name == "grid.png" for path in together)
    alone = draw("prompts=[picture w3]", "seeds=[4]")
    ours = [picture for path, picture in together.items() if path.name.startswith("0003_picture_w3_4")]
    theirs = [picture for path, picture in alone.items() if "picture_w3_4" in path.name]
    assert np.abs(ours[0].astype(int) - theirs[0]).max() <= 1
    others = [picture for path, picture in together.items() if path.name.startswith("0002_")]
    assert np.abs(ours[0].astype(int) - others[0]).max() > 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm", "dpmpp_2m"])
def test_pictures_have_the_size_asked_for_and_say_how_they_were_made(draw, sampler):
    pictures = draw("prompts=[w1]", "size=[64, 96]", f"sampler={sampler}", "use_ema=false")
    path, picture = next((path, picture) for path, picture in pictures.items() if path.name != "grid.png")
    assert picture.shape == (64, 96, 3)
    assert read_metadata(path)["prompt"] == "w1"
    assert sampler in read_metadata(path)["settings"]


def test_a_mistake_is_named(draw, tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw()
    with pytest.raises(ConfigError, match="prompt_file: nowhere does not exist"):
        draw("prompt_file=nowhere")
    with pytest.raises(ConfigError, match="is no training run"):
        draw("prompts=[w1]", f"run={tmp_path}")
