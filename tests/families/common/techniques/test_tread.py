"""TREAD: kept tokens take the whole way, others skip blocks, and drawing knows nothing of it."""

import pytest
import torch

from families.common.library_networks import adapt
from families.common.techniques.tread import TokenRouting, TreadSettings, kept_tokens
from tests.families.common.techniques.tiny_transformer import TinyTransformer, tiny_inputs
from tests.families.common.tiny_unets import SD15, unet
from warpcore.errors import UserError
from warpcore.random import SampleRandom

RANDOM = SampleRandom([11, 12, 13])
SETTINGS = TreadSettings(share=0.3, start=1, end=4)


def routed_by_hand(network: TinyTransformer, given: dict, kept: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Sample by sample, with plain indexing."""
    made = []
    for place, own_kept in enumerate(kept):
        x = given["x"][place : place + 1]
        condition, shared = given["condition"][place : place + 1], given["shared"]
        own = tuple(part[place : place + 1] for part in given["own"])
        for number, block in enumerate(network.blocks):
            if start <= number < end:
                short = tuple(part[:, own_kept] for part in own)
                x = x.clone()
                x[:, own_kept] = block(x[:, own_kept], condition, shared[own_kept], short)
            else:
                x = block(x, condition, shared, own)
        made.append(network.last(x))
    return torch.cat(made)


def with_gradients(network: TinyTransformer, output: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    output.square().mean().backward()
    return [output, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("level", [0, 3])
def test_outputs_and_gradients_are_those_of_routing_by_hand(level):
    network, given = TinyTransformer(), tiny_inputs()
    kept = kept_tokens(RANDOM, 10, 0.3)
    expected = with_gradients(network, routed_by_hand(network, given, kept, 1, 4))
    network.set_activation_checkpointing(level)
    routing = TokenRouting(network.train(), SETTINGS)
    with routing.drawn(RANDOM):
        found = with_gradients(network, network(**given))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_blocks_of_the_route_see_the_kept_tokens_and_the_others_pass_unchanged():
    network, given, seen = TinyTransformer().train(), tiny_inputs(), []
    routing = TokenRouting(network, SETTINGS)
    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, made: seen.append((inputs[0], made)))
    with routing.drawn(RANDOM):
        network(**given)
    assert [inputs.shape[1] for inputs, _ in seen] == [10, 7, 7, 7, 10]
    (_, entered), (_, left) = seen[0], seen[3]
    kept = kept_tokens(RANDOM, 10, 0.3)
    for place in range(3):
        skipped = sorted({*range(10)} - {*kept[place].tolist()})
        assert torch.equal(left[place, skipped], entered[place, skipped])
        assert not torch.isclose(left[place, kept[place]], entered[place, kept[place]]).all(dim=1).any()


@pytest.mark.bits
def test_without_seeds_and_in_evaluation_mode_it_computes_what_it_did():
    plain, given = TinyTransformer().train(), tiny_inputs()
    network = TinyTransformer().train()
    routing = TokenRouting(network, SETTINGS)
    expected = plain(**given)
    assert torch.equal(network(**given), expected)
    with routing.drawn(RANDOM):
        assert not torch.equal(network(**given), expected)
        assert torch.equal(network.eval()(**given), plain.eval()(**given))


def test_each_sample_has_its_own_tokens_by_its_seed():
    kept = kept_tokens(RANDOM, 64, 0.5)
    assert kept.shape == (3, 32)
    assert torch.equal(kept[1:], kept_tokens(SampleRandom([12, 13]), 64, 0.5))
    assert len({tuple(row) for row in kept.tolist()}) == 3
    assert all(row == sorted({*row}) for row in kept.tolist())
    many = kept_tokens(SampleRandom(range(4000)), 8, 0.5).flatten().bincount(minlength=8)
    assert many.float().div(4000).sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("settings", "depth", "route"),
    [
        ({}, 28, range(2, 24)),
        ({}, 6, range(1, 5)),
        ({"start": 0, "end": 2}, 2, range(2)),
        ({"end": 6}, 12, range(1, 6)),
    ],
)
def test_the_published_route_fits_other_depths(settings, depth, route):
    assert TreadSettings(**settings).route(depth) == route


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(UserError, match="UNet2DConditionModel is none; remove the key"):
        TokenRouting(adapt(unet(SD15)), TreadSettings())
    with pytest.raises(UserError, match="the network has 5 blocks; write start and end with 0 <= start < end <= 5"):
        TokenRouting(TinyTransformer(), TreadSettings(start=3, end=9))
