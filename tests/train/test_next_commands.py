"""At its end a run names the command that draws with it, which works as it is told.

That it draws what the samples show is in `test_samples_are_drawn.py`.
"""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from families.common.family import RECONSTRUCTION, SCRIPTS, TEXT_TO_IMAGE, TEXT_TO_VIDEO
from families.common.next_commands import drawing_commands, size_keys
from families.registry import load_task
from tests.tiers import represented_by
from tests.train.test_every_script import settings, train, use_case  # noqa: F401
from tests.warpcore.runs import tiny_settings
from tests.warpcore.tiny import TinyConfig
from warpcore.config import Config, make_config

TASKS = {
    "train_c_controlnet": TEXT_TO_IMAGE, "train_nova": TEXT_TO_VIDEO, "train_sd": TEXT_TO_IMAGE,
    "train_stdit": TEXT_TO_VIDEO, "train_vae": RECONSTRUCTION,
}  # fmt: skip


def of_command(config: Config, task: str) -> dict[str, str]:
    """The keys of the command that the run of a config has told for a task."""
    with open(config.run_folder / "notes.jsonl", encoding="utf-8") as file:
        notes = [json.loads(line)["text"] for line in file]
    (told,) = (note for note in notes if note.startswith("to draw with it: "))
    assert notes.index(told) == len(notes) - 2, "only the end follows"
    python, script, *words = shlex.split(told.partition(": ")[2])
    assert (python, script) == ("python3", SCRIPTS[task])
    return dict(word.split("=", 1) for word in words)


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_vae", of=TASKS))
def test_the_command_of_a_run_is_taken(settings, name, tmp_path):  # noqa: F811
    given = settings(name, "run", updates=1, save_every=1)
    if "sample_prompts" in use_case(name).Config.model_fields:
        given["sample_prompts"] = ["a 'red' box, \"left\" & (blue:1.2)"]
    train(name, given)
    config = make_config(use_case(name).Config, given)
    keys = of_command(config, TASKS[name])
    picture = tmp_path / "pictures" / "PICTURE.png"
    picture.parent.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    words = {"FOLDER": str(picture.parent), "PICTURE": str(picture)}
    _, drawing = load_task(TASKS[name], [f"{key}={words.get(value, value)}" for key, value in keys.items()])
    assert [str(run) for run in drawing.run] == [str(config.run_folder)]
    if "sample_prompts" in given:
        assert drawing.all_prompts == given["sample_prompts"]


def test_sizes_that_are_no_squares_are_said_and_runs_on_s3_have_no_command(tmp_path):
    given = tiny_settings(tmp_path / "my runs", tmp_path / "a.tar", updates=1, image_size=[96, 64])
    config = make_config(TinyConfig, given)
    (told,) = drawing_commands(TEXT_TO_IMAGE, config, prompts=['a "b"'], seed=None, **size_keys(config))
    assert told == (
        "to draw with it: python3 inference/text_to_image.py "
        f"'run={tmp_path}/my runs/tiny' 'prompts=[\"a \\\"b\\\"\"]' 'size=[64, 96]'"
    )
    assert size_keys(config, 1.5) == {"size": [96, 144]}
    assert drawing_commands(TEXT_TO_IMAGE, make_config(TinyConfig, given | {"checkpoint_path": "s3://a/b"})) == []
