"""Hidden tokens, and the groups in which they are drawn, are those of the reference."""

import pytest
import torch

from families.nova.masks import group_sizes, mask_ratio, split_tokens, visible_tokens
from modules.nova_embeddings import MaskEmbedding
from tests.golden import load_case, resolve, weights_of
from tests.small_nova import load_nova

CALLS, TENSORS = load_nova("mask_embed")


@pytest.mark.parametrize("name", ["training_16", "training_24", "training_9"])
@torch.no_grad()
def test_hidden_tokens_are_those_of_the_reference(name):
    call = CALLS[name]
    embedding = MaskEmbedding(6)
    embedding.load_state_dict(weights_of(load_case("nova/mask_embed")[0], TENSORS))
    (x,), draws = resolve(call["args"], TENSORS), resolve(call["draws"], TENSORS)
    expected = resolve(call["result"], TENSORS)
    hidden, visible = split_tokens(draws["order_uniform"][..., 0], visible_tokens(draws["mask_ratio"], x.shape[1]))
    assert torch.equal(visible, expected["prev_ids"][..., 0])
    assert torch.equal(hidden.float(), expected["mask"][..., 0])
    assert torch.equal(embedding(x, hidden), expected["masked"])


def test_numbers_of_visible_tokens_are_those_of_the_reference():
    call = CALLS["visible_counts"]
    found = [[visible_tokens(ratio, tokens) for tokens in call["tokens"]] for ratio in call["mask_ratios"]]
    assert found == call["result"]


def test_shares_of_hidden_tokens_have_the_published_distribution():
    call = CALLS["mask_ratio_quantiles"]
    assert [mask_ratio(quantile) for quantile in call["quantiles"]] == pytest.approx(call["result"], abs=1e-6)


def test_groups_are_as_large_as_the_reference_s():
    calls, _ = load_nova("num_preds")
    for call in calls.values():
        found = group_sizes(call["kwargs"]["num_patches"], call["kwargs"]["num_inference_steps"])
        assert found == call["result"]
        assert sum(map(bool, found)) == call["steps_that_predict"]
