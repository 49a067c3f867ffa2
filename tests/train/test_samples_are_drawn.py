"""The sample pictures of a run are those that inference draws from its weights with `seeds` that follow its `seed`, by
the command that the run names at its end.

Those of Stable Diffusion are in `tests/families/stable_diffusion/test_samples.py`. Sources: ostris/ai-toolkit#309 and
#589, bghira/SimpleTuner#578, Nerogar/OneTrainer#376.
"""

import numpy as np
import pytest
import torch

from families.common.family import CLASS_TO_IMAGE, TEXT_TO_IMAGE
from families.common.pictures import to_pictures
from families.registry import load_task
from tests.tiers import represented_by
from tests.train.test_every_script import settings, use_case  # noqa: F401
from tests.train.test_next_commands import of_command
from warpcore.config import make_config

pytestmark = pytest.mark.integration

PROMPTS = ["picture w1", "w2"]
OF_PROMPTS = {"sample_prompts": PROMPTS}
# The encoder of the small cascade has 32 px per position; those of drawings are 16 px.
OF_CASCADE = {"preview": True, "size": [32, 32]}
CASES = {
    "train_c": (OF_PROMPTS, OF_CASCADE),
    "train_c_lora": (OF_PROMPTS, OF_CASCADE),
    "train_cosmos": (OF_PROMPTS, {}),
    "train_cosmos_lora": (OF_PROMPTS, {}),
    "train_dit": ({"sample_classes": [1, 4], "sample_sampler": "iddpm"}, {}),
    "train_latte": ({"sample_classes": [1, 4]}, {}),
    "train_nova classes": ({"sample_classes": [1, 4]}, {"groups": 2}),
    "train_nova pictures": (OF_PROMPTS, {"groups": 2}),
    "train_pixart": (OF_PROMPTS, {}),
}
"""What training draws, and what inference is told beside steps, sampler, guidance and size."""


@pytest.mark.parametrize("name", represented_by("train_c", "train_cosmos", of=CASES))
def test_samples_are_what_inference_draws_with_the_same_seeds(settings, name):  # noqa: F811
    of_training, of_inference = CASES[name]
    given = settings(name, "run", updates=2, save_every=2, seed=3, **of_training)
    rows = []

    class Recorded(use_case(name)):
        def sample(self, held_out):
            rows[:] = super().sample(held_out)
            return rows

    config = make_config(Recorded.Config, given)
    assert Recorded(config).run() == 0
    expected = np.stack([row.pictures.get("LoRA", row.pictures.get("sample")) for row in rows])
    task, titles = TEXT_TO_IMAGE, {"prompts": PROMPTS}
    if "sample_classes" in of_training:
        task, titles = CLASS_TO_IMAGE, {"classes": of_training["sample_classes"]}
    named = {} if "size" in of_inference else of_command(config, task)
    keys = {"run": config.run_folder} | named | titles | of_inference | {
        "device": "cpu", "seeds": [3, 4],
        "steps": config.sample_steps, "sampler": config.sample_sampler, "guidance": config.sample_guidance,
    }  # fmt: skip
    kind, drawing = load_task(task, [f"{key}={value}" for key, value in keys.items()])
    task = kind(drawing)
    drawn = torch.stack(task.draw(getattr(task, "labels", PROMPTS), drawing.seeds).pictures)
    found = to_pictures(drawn, expected.shape[1:3] if expected.ndim == 4 else None)
    assert expected.std() > 1
    assert np.abs(found.astype(int) - expected).max() <= 1
