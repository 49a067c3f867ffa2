"""TREAD on Cosmos' transformer: kept tokens keep their rotary positions, sample by sample."""

import torch

from families.common.techniques.tread import TokenRouting, TreadSettings, kept_tokens
from families.cosmos.transformer import CosmosTransformer3DModel, adapted
from tests.families.cosmos.tiny_pipeline import TRANSFORMER
from warpcore.random import SampleRandom

RANDOM = SampleRandom([5, 6])


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made = CosmosTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return adapted(made).train()


def test_routed_blocks_compute_what_the_library_does_on_the_kept_tokens_of_each_sample():
    given = {"x": torch.randn(2, 16, 4, 6), "times": torch.tensor([0.2, 0.8])}
    text = torch.randn(2, 5, 16)
    routed, seen = network(), []
    routing = TokenRouting(routed, TreadSettings(start=0, end=1))
    block = routed.blocks[0]
    block.register_forward_hook(lambda block, inputs, made: seen.append(made))
    with routing.drawn(RANDOM):
        routed(**given, encoder_hidden_states=text)
    plain, calls = network(), []
    own = plain.blocks[0]
    own.register_forward_pre_hook(lambda block, inputs: calls.append(inputs))
    plain(**given, encoder_hidden_states=text)
    x, condition, embedded, temb, positions, *_ = calls[0]
    kept = kept_tokens(RANDOM, 6, 0.5)
    expected = x.clone()
    for place in range(2):  # with the positions of one sample at a time, which the library can take
        of_sample, rows = slice(place, place + 1), kept[place]
        rotary = tuple(part[rows] for part in positions)
        made = own(x[of_sample, rows], condition[of_sample], embedded[of_sample], temb[of_sample], rotary)
        expected[of_sample, rows] = made
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen[0], own(*calls[0]), atol=1e-3)
