"""The contenders of the benchmark of Stable Diffusion train, on the features that they claim."""

import pytest
import torch

from benchmarks.sd_step import Case, our_update, their_update, training, with_features
from warpcore.rehearsal import made_up_batch


@pytest.mark.slow
@pytest.mark.integration
def test_contenders_make_updates(tmp_path):
    run = training(Case("tiny", "mini", 64, 2), torch.device("cpu"), tmp_path)
    pictures = made_up_batch(run, (64, 64), 2)
    features = with_features(run, pictures)
    assert features.images is None
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    for batch in (pictures, features):
        our_update(run, batch)()
        assert any(not torch.equal(p, before[name]) for name, p in run.parameters.items())
        before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    their_update(run, features, tmp_path)()
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())  # it has a U-Net of its own
    run.close()
