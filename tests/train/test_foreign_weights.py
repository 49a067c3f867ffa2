"""Weights of another family to start from: what they say of themselves is not compared with the config."""

import pytest
import torch
from safetensors.torch import save_file

from families.common.weight_files import FAMILY_KEY, TARGET_KEY
from tests.train.test_every_script import SETTINGS, use_case
from tests.warpcore.runs import tiny_settings
from warpcore.config import make_config
from warpcore.errors import UserError


@pytest.mark.integration
@pytest.mark.parametrize("holder", ["train_pixart", "train_cosmos", "train_dit"])
def test_weights_of_another_family_are_refused_for_their_tensors_not_their_target(tmp_path, holder):
    """Writing the target that such a file says would help nobody."""
    kind = use_case(holder)
    file = tmp_path / "other.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(2, 2)}, file, {TARGET_KEY: "x0"})
    given = {"model_version": "mini", "generator_checkpoint_path": str(file)} | SETTINGS[holder]
    given |= {} if holder == "train_cosmos" else {"diffusion_target": "v"}
    run = kind(make_config(kind.Config, tiny_settings(tmp_path, tmp_path / "a.tar", **given)))
    with pytest.raises(UserError) as error:
        run.begin(None)
    assert "other.safetensors" in str(error.value)
    assert "x0" not in str(error.value)


@pytest.mark.integration
@pytest.mark.parametrize("holder", ["train_pixart_lora", "train_cosmos", "train_latte"])
def test_weights_that_say_another_family_are_refused_by_its_name(tmp_path, holder):
    kind, file = use_case(holder), tmp_path / "other.safetensors"
    save_file({"blocks.0.weight": torch.zeros(2, 2)}, file, {FAMILY_KEY: "made up", "config": "{}"})
    given = {"model_version": "mini", "generator_checkpoint_path": str(file)} | SETTINGS[holder]
    run = kind(make_config(kind.Config, tiny_settings(tmp_path, tmp_path / "a.tar", **given)))
    with pytest.raises(UserError, match="says that it is of made up, not of"):
        run.begin(None)
