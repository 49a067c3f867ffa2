"""A validation is told with its loss, in the terminal and the notes."""

import json
import math

import pytest

from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore.validation import told


def test_the_loss_of_the_weights_and_of_their_average_are_told():
    means = {"validation_loss": 0.123456, "validation_loss/level_0.5": 1.0, "validation_psnr": 20.0}
    assert told(means) == "validation loss 0.1235"
    means |= {"validation_loss_ema": 12.3456, "validation_psnr_ema": math.nan}
    assert told(means) == "validation loss 0.1235 (average: 12.35); no number: validation_psnr_ema"


@pytest.mark.integration
def test_a_run_tells_each_of_its_validations(tmp_path):
    data = write_shard(tmp_path / "a.tar", 10)
    settings = tiny_settings(tmp_path, data, updates=4, save_every=2, validation_samples=2, ema_start_iters=3)
    _, lines = train_here(settings)
    with open(tmp_path / "tiny/notes.jsonl", encoding="utf-8") as file:
        notes = [json.loads(line)["text"] for line in file]
    first, last = (note for note in notes if "validation loss" in note)
    assert first == f"update 2: validation loss {lines[1]['validation_loss']:.4g}"
    numbers = lines[3]["validation_loss"], lines[3]["validation_loss_ema"]
    assert last == "update 4: validation loss {:.4g} (average: {:.4g})".format(*numbers)
