"""Every training script computes in 16 bits, resumes and validates there, and learns what it learns in float32."""

import math

import pytest

from tests.tiers import represented_by
from tests.train.test_every_script import (
    SETTINGS,
    settings,  # noqa: F401
    train,
)
from tests.warpcore.runs import numbers

pytestmark = pytest.mark.integration
WITH_BATCH_NORMS = {"train_a", "train_b joint", "train_c_controlnet", "train_encoder"}
"""They want float32, which an error about `weights_dtype: bfloat16` says."""


@pytest.mark.parametrize("name", represented_by("train_cosmos_lora", of=SETTINGS))
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_losses_are_those_of_float32(settings, name, dtype):  # noqa: F811
    exact = train(name, settings(name, "exact", updates=1))
    whole = settings(name, "whole", dtype=dtype)
    lines = train(name, whole)
    assert lines[0]["samples_hash"] == exact[0]["samples_hash"]
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    evaluated = {line["update"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert evaluated.keys() == {2, 4} or name.startswith("train_towers")
    assert all(map(math.isfinite, evaluated.values()))
    halves = whole | {"experiment_id": "halves"}
    train(name, halves | {"updates": 2})
    assert numbers(train(name, halves)) == numbers(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - WITH_BATCH_NORMS))
def test_bfloat16_weights_learn(settings, name):  # noqa: F811
    lines = train(name, settings(name, "run", weights_dtype="bfloat16", optimizer="adamw"))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
