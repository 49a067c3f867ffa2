"""The contenders of the benchmark of the families train, on the features that they claim."""

import pytest
import torch

from benchmarks.family_step import our_update, their_update, training, with_features
from benchmarks.plain_loops import FAMILIES, Case
from benchmarks.plain_stdit import PlainAttention, PlainCrossAttention
from families.common.features import stored
from families.open_sora import build
from families.open_sora.config import OpenSoraSettings


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", FAMILIES)
def test_contenders_make_updates(name, tmp_path):
    family = FAMILIES[name]
    frames = family.on_cpu[0].num_frames
    case = Case("tiny", family.on_cpu[0].version, 64, 2, num_frames=frames and min(frames, 5))
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


@pytest.mark.parametrize("version", ["mini", "mini-1.1", "mini-1.0"])
def test_attention_that_is_written_out_computes_what_ours_does(version):
    network = build.network(OpenSoraSettings(model_version=version))
    block = [*network.blocks][-1]
    for name, parameter in block.named_parameters():  # so that norms before and after positions differ
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    x, text = torch.randn(2, 6, network.hidden_size), torch.randn(2, 4, network.hidden_size)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    rotations = [None, network.rope(6)] if hasattr(network, "rope") else [None]
    with torch.no_grad():
        for rotation in rotations:
            ours, theirs = block.attn(x, rotation), PlainAttention(block.attn)(x, rotation)
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        plain = PlainCrossAttention(block.cross_attn)(x, text, mask)
        torch.testing.assert_close(plain, block.cross_attn(x, text, mask), rtol=1e-4, atol=1e-4)
