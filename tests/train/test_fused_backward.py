"""Every training script makes the same updates with its steps in the backward pass, where layers also run again."""

import pytest
import torch

from tests.tiers import represented_by
from tests.train.test_every_script import (
    SETTINGS,
    files,
    settings,  # noqa: F401
    train,
)
from tests.warpcore.runs import numbers

WITHOUT_CHECKPOINTING = {"train_b joint", "train_encoder", "train_towers", "train_towers t5"}


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize("name", represented_by("train_pixart", of=SETTINGS))
def test_steps_in_the_backward_pass_make_the_same_updates(settings, name):  # noqa: F811
    levels = {} if name in WITHOUT_CHECKPOINTING else {"activation_checkpointing": 3}
    whole = settings(name, "whole", updates=2, clip_grad_norm=None, validation_samples=0, **levels)
    fused = whole | {"experiment_id": "fused", "fused_backward": True}
    assert numbers(train(name, fused)) == numbers(train(name, whole))
    ours, theirs = files(fused), files(whole)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        for key, tensor in tensors.items():
            assert torch.equal(ours[file][key], tensor), (file, key)
