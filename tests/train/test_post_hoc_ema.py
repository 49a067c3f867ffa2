"""`post_hoc_ema` in every script: what `tools/average.py` makes is what the run exports, LoRAs included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families.common.weight_files import metadata_of
from tests.tiers import represented_by
from tests.train.test_every_script import (
    SETTINGS,
    settings,  # noqa: F401
    train,
)
from tools.average import AverageSettings, average

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", represented_by("train_c_lora", of=SETTINGS))
def test_an_average_is_what_the_run_exports(settings, name, tmp_path):  # noqa: F811
    given = settings(name, "run", updates=2, save_every=1, post_hoc_ema={"every": 1})
    train(name, given)
    run, made = Path(given["checkpoint_path"]) / "run", tmp_path / "made"
    average(run, made, AverageSettings(sigma_rel=0.1, update=2))
    exported = {path.name for path in run.glob("*.safetensors") if not path.stem.endswith("_ema")}
    assert {path.name for path in made.glob("*.safetensors")} == exported
    for file in exported:
        ours, theirs = load_file(made / file), load_file(run / file)
        assert {key: tensor.shape for key, tensor in ours.items()} == {k: t.shape for k, t in theirs.items()}
        snapshot = load_file(run / "post_hoc" / "00000002" / "0.1" / file)
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, snapshot[key], rtol=1e-3, atol=1e-5)
        assert metadata_of(made / file) == metadata_of(run / file) | {"sigma_rel": "0.1"}
