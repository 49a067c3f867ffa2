"""The pictures of a training are those that inference draws with its weights, from the same noise.

Sources: ostris/ai-toolkit#309 and #589, bghira/SimpleTuner#578, Nerogar/OneTrainer#376.
"""

import numpy as np
import pytest
import torch

from families.common.pictures import to_pictures
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from tests.families.stable_diffusion.test_train_sd import settings_of
from tests.families.stable_diffusion.tiny_pipeline import write_sdxl
from tests.tiers import represented_by
from train.train_sd import TrainSd
from warpcore.config import make_config

pytestmark = pytest.mark.integration

RUNS = {
    "sd15 averaged": ("sd15", {"ema_start_iters": 1, "ema_beta": 0.5}),
    "sdxl": ("sdxl", {"sample_sampler": "euler"}),
    "zero snr": ("sdxl", {}),
    "straight flow": (
        "sdxl",
        {"diffusion_target": "rectified_flows", "change_target": True, "sample_sampler": "euler", "shift": 3.0},
    ),
}


@pytest.mark.parametrize("name", represented_by("straight flow", of=RUNS))
def test_samples_are_what_inference_draws(tmp_path, name):
    version, changes = RUNS[name]
    if name == "zero snr":
        write_sdxl(tmp_path / "pipeline", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    prompts = ["a red dog", "cats"]
    settings = settings_of(tmp_path, version, sample_prompts=prompts, sample_steps=4, lr=1e-3, **changes)
    drawn = []

    class Recorded(TrainSd):
        def draw(self, *given):
            drawn.append(super().draw(*given)["sample"])
            return {"sample": drawn[-1]}

    assert Recorded(make_config(TrainSd.Config, settings)).run() == 0
    task = StableDiffusionTextToImage(
        make_config(
            StableDiffusionTextToImage.Config,
            {
                "run": str(tmp_path / settings["experiment_id"]), "prompts": prompts, "size": [64, 64], "steps": 4,
                "sampler": settings.get("sample_sampler", "ddim"), "guidance": 7.5,
            },
        )
    )  # fmt: skip
    pictures = task.draw(prompts, [settings.get("seed", 0) + i for i in range(2)]).pictures
    found = to_pictures(torch.stack(pictures)).astype(int)
    assert found.std() > 3
    assert np.abs(found - drawn[-1]).max() <= 1


def test_prompts_that_are_not_drawn_are_counted(tmp_path, capsys):
    """Source: d8ahazard/sd_dreambooth_extension#250."""
    settings = settings_of(tmp_path, "sd15", sample_prompts=["a", "b", "c"], sample_count=2, sample_steps=1)
    assert TrainSd(make_config(TrainSd.Config, settings)).run() == 0
    assert "sample_prompts: the first 2 of 3 are drawn (sample_count)" in "".join(capsys.readouterr())
