"""The contenders of the benchmark of the families train, on the features that they claim."""

import pytest
import torch

from benchmarks.family_step import our_update, their_update, training, with_features
from benchmarks.plain_loops import FAMILIES, Case
from families.common.features import stored


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", FAMILIES)
def test_contenders_make_updates(name, tmp_path):
    family = FAMILIES[name]
    frames = family.on_cpu[0].num_frames
    case = Case("tiny", "mini", 64, 2, num_frames=frames and min(frames, 5))
    run = training(family, case, torch.device("cpu"), tmp_path)
    pictures = family.batch(run, case)
    features = with_features(run, pictures)
    assert features.images is None
    assert all(stored(features, feature) is not None for feature in run.features)
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    for batch in (pictures, features):
        our_update(run, batch)()
        assert any(not torch.equal(p, before[name]) for name, p in run.parameters.items())
        before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    their_update(family, run, features, tmp_path)()
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())  # it has a network of its own
    network, loss_of = family.plain_loop(run, features, tmp_path)
    loss_of().backward()
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in run.parameters.values())
    run.close()
