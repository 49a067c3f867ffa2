"""`validation_levels`: every script tells the loss of each level and bucket, whatever its micro-batches are."""

import math

import pytest

from families.common.config import DiffusionConfig
from tests.tiers import represented_by
from tests.train.test_every_script import (
    NEEDS_WHOLE_BATCHES,
    SETTINGS,
    settings,  # noqa: F401
    train,
    use_case,
)
from tests.warpcore.runs import numbers

pytestmark = pytest.mark.integration
OF_DIFFUSION = {name for name in SETTINGS if issubclass(use_case(name).Config, DiffusionConfig)}


@pytest.mark.parametrize("name", represented_by("train_c", of=OF_DIFFUSION))
def test_the_loss_is_the_mean_of_fixed_levels(settings, name):  # noqa: F811
    changes = {"validation_levels": 3, "validation_samples": 3, "batch_size": 2, "micro_batch_size": 2}
    whole = settings(name, "whole", **changes)
    lines = train(name, whole)
    told = {key: value for key, value in lines[-1].items() if key.startswith("validation_loss")}
    levels = [told[f"validation_loss/level_{level}"] for level in ("0.1667", "0.5", "0.8333")]
    assert told["validation_loss"] == pytest.approx(sum(levels) / 3)
    assert len(set(levels)) == 3
    buckets = [key for key in told if key.startswith("validation_loss/size_") and not key.endswith("_ema")]
    assert len(buckets) >= 1
    assert all(map(math.isfinite, told.values()))
    assert {f"{key}_ema" for key in told if not key.endswith("_ema")} == {key for key in told if key.endswith("_ema")}
    halves = whole | {"experiment_id": "halves"}
    train(name, halves | {"updates": 2})
    assert numbers(train(name, halves)) == numbers(lines)
    if name not in NEEDS_WHOLE_BATCHES:
        alone = train(name, whole | {"experiment_id": "alone", "updates": 2, "micro_batch_size": 1})
        for key in told:
            assert alone[-1][key] == pytest.approx(lines[1][key], rel=1e-2), key
