"""`clip_skip` in training, in its samples, in drawing, and in what files and caches say of themselves.

Sources: kohya-ss/sd-scripts#580, huggingface/diffusers#1721.
"""

import pytest
import torch

from families.common.pictures import to_pictures
from families.stable_diffusion.exports import to_diffusers
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from tests.caches import make_cache
from tests.families.stable_diffusion.test_train_sd import settings_of
from tests.warpcore.runs import read_metrics
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PROMPTS = ["a red dog", "cats"]


def trained(settings: dict) -> tuple[TrainSd, list]:
    """A run, and the pictures that it drew."""
    drawn = []

    class Recorded(TrainSd):
        def draw(self, *given):
            drawn.append(super().draw(*given)["sample"])
            return {"sample": drawn[-1]}

    run = Recorded(make_config(TrainSd.Config, settings))
    assert run.run() == 0
    return run, drawn


def test_a_hidden_state_is_learned_drawn_and_said(tmp_path, capsys):
    common = {"sample_prompts": PROMPTS, "latent": "mean", "lr": 1e-3}
    settings = settings_of(tmp_path, "sd15", clip_skip=2, **common)
    (_, drawn), folder = trained(settings), tmp_path / settings["experiment_id"]
    trained(settings | {"clip_skip": None, "experiment_id": "plain"})
    losses = [read_metrics(settings | {"experiment_id": name})[0]["loss"] for name in (folder.name, "plain")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)

    given = {"prompts": PROMPTS, "size": [64, 64], "steps": 2, "sampler": "ddim", "guidance": 7.5}
    seeds = [0, 1]
    beside = {f"{name}_checkpoint_path": str(tmp_path / "pipeline") for name in ("autoencoder", "text_encoder")}
    to_diffusers(folder, tmp_path / "exported", [])
    assert "write clip_skip=1 in each call" in capsys.readouterr().out
    for place in (
        {"run": str(folder)},
        {"generator_checkpoint_path": str(tmp_path / "exported")},
        {"generator_checkpoint_path": str(folder / "generator_ema.safetensors")} | beside,
    ):
        config = make_config(StableDiffusionTextToImage.Config, given | place)
        assert config.clip_skip == 2
        found = to_pictures(torch.stack(StableDiffusionTextToImage(config).draw(PROMPTS, seeds).pictures))
        assert abs(found.astype(int) - drawn[-1]).max() <= 1
    other = make_config(StableDiffusionTextToImage.Config, given | {"run": str(folder), "clip_skip": 1})
    pictures = to_pictures(torch.stack(StableDiffusionTextToImage(other).draw(PROMPTS, seeds).pictures))
    assert abs(pictures.astype(int) - drawn[-1]).max() > 1

    base = str(folder / "generator.safetensors")
    again, _ = trained(
        settings | beside | {"generator_checkpoint_path": base, "clip_skip": None, "experiment_id": "more"}
    )
    assert again.config.clip_skip == 2  # as the file says
    silent = settings | beside | {"generator_checkpoint_path": base, "clip_skip": None}
    made = make_cache("train_sd", silent, tmp_path / "silent", "--features", "texts", "--dtype", "float32")
    trained(silent | {"caches": [str(made)], "experiment_id": "silent"})
    cache = make_cache("train_sd", settings, tmp_path / "texts", "--features", "texts", "--dtype", "float32")
    cached = settings | {"caches": [str(cache)], "experiment_id": "cached"}
    trained(cached)
    with pytest.raises(UserError, match="clip_skip is 2 in the cache, None here"):
        trained(cached | {"clip_skip": None, "experiment_id": "other"})
    with pytest.raises(UserError, match="clip_skip 9 of 3 layers"):
        trained(settings | {"clip_skip": 9, "experiment_id": "none"})
