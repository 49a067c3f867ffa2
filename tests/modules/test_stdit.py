"""STDiT and STDiT2 predict what the reference does, whatever is masked, and have the tensors of published files."""

import pytest
import torch
from torch import Tensor, nn

from modules.dit import frame_positions
from modules.stdit import POSITIONS, XL_2, STDiT, STDiT2
from tests.golden import load_case, load_manifest, resolve, weights_of

KINDS = {"stdit1_small": STDiT, "stdit2_small": STDiT2, "stdit2_norm_before_rotation": STDiT2}
CASES = {case: load_case(f"opensora/{case}") for case in KINDS}
CALLS = {case: {call["name"]: call for call in spec["calls"]} for case, (spec, _) in CASES.items()}
FORWARDS = [
    (case, name) for case, calls in CALLS.items() for name, call in calls.items() if call["method"] == "__call__"
]
MASKED = {"stdit1_small": "x_mask", "stdit2_small": "x_mask_4x4x4"}


def golden_network(case: str) -> nn.Module:
    spec, tensors = CASES[case]
    network = KINDS[case](**spec["constructor"])
    computed = {name: tensor for name, tensor in network.state_dict().items() if name in (*POSITIONS, "rope.freqs")}
    network.load_state_dict(weights_of(spec, tensors, computed))
    return network


def inputs(case: str, name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional ones and conditions of a call."""
    x, t, y = resolve(CALLS[case][name]["args"], CASES[case][1])
    given = resolve(CALLS[case][name].get("kwargs", {}), CASES[case][1])
    if case.startswith("stdit2"):  # which our network counts and divides itself
        assert given.pop("num_frames").eq(x.shape[2]).all()
        torch.testing.assert_close(given.pop("ar"), given["height"] / given["width"])
    return [x, t, y[:, 0]], given


@pytest.mark.parametrize(("case", "name"), FORWARDS)
@torch.no_grad()
def test_it_predicts_what_the_reference_does(case, name):
    args, conditions = inputs(case, name)
    found, call = golden_network(case)(*args, **conditions), CALLS[case][name]
    expected = resolve(call["result"], CASES[case][1])
    assert found.shape == expected.shape
    if (noised := conditions.get("x_mask")) is not None:  # nobody uses what the reference gives in given frames
        found, expected = (clip.transpose(1, 2)[noised] for clip in (found, expected))
        assert 0 < found.numel() < args[0].numel() * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@torch.no_grad()
def test_tables_and_embeddings_are_those_of_the_reference():
    network, expected = golden_network("stdit1_small"), CASES["stdit1_small"][1]
    for name in POSITIONS:
        torch.testing.assert_close(getattr(network, name), expected[f"out.{name}"], rtol=0, atol=2e-5)
    by_thirds = STDiT(**CASES["stdit1_small"][0]["constructor"] | {"time_scale": 2 / 3}).pos_embed_temporal
    torch.testing.assert_close(by_thirds, expected["out.pos_embed_temporal_time_scale_two_thirds"], rtol=0, atol=2e-5)
    assert (by_thirds - frame_positions(4, 48)).abs().max() > 0.1
    network, expected = golden_network("stdit2_small"), CASES["stdit2_small"][1]
    sizes = expected["in.csize_embedder.args.0"]
    sides = torch.cat([network.csize_embedder(side) for side in sizes.unbind(1)], dim=1)
    torch.testing.assert_close(sides, expected["out.csize_embedder"], rtol=0, atol=3e-5)


@torch.no_grad()
def test_clips_of_another_size_than_its_tables_have_positions_from_the_same_corner():
    """The tables of a network for a size are a cut of those for a larger one; so are the positions it computes."""
    made = CASES["stdit1_small"][0]["constructor"]
    small, large = STDiT(**made), STDiT(**made | {"input_size": [6, 8, 12]})
    (x, t, y), _ = inputs("stdit1_small", "masked_text")
    weights = golden_network("stdit1_small").state_dict()
    small.load_state_dict(weights)
    large.load_state_dict(weights | {name: getattr(large, name) for name in POSITIONS})
    torch.testing.assert_close(large(x, t, y), small(x, t, y), rtol=0, atol=1e-5)
    longer = torch.randn(2, 4, 6, 8, 12)
    torch.testing.assert_close(small(longer, t, y), large(longer, t, y), rtol=0, atol=1e-5)
    odd = x[:, :, :3, :7, :5]
    assert small(odd, t, y).shape == (2, 8, 3, 7, 5)


@pytest.mark.parametrize("case", ["stdit1_small", "stdit2_small"])
@torch.no_grad()
def test_text_that_does_not_count_has_no_influence_and_a_dropped_caption_is_the_empty_text(case):
    network = golden_network(case)
    name = "masked_text" if case == "stdit1_small" else "masked_text_3x6x5"
    (x, t, y), conditions = inputs(case, name)
    other = torch.where(conditions["mask"][:, :, None] == 1, y, y + 7)
    assert not torch.equal(other, y)
    torch.testing.assert_close(network(x, t, other, **conditions), network(x, t, y, **conditions))
    dropped = network(x, t, y, dropped=torch.tensor([True, False]), **conditions)
    assert torch.equal(dropped, network(x, t, torch.stack([network.y_embedder.y_embedding, y[1]]), **conditions))
    with pytest.raises(ValueError, match="text of 9 tokens: model_max_length is 8"):
        network(x, t, torch.zeros(2, 9, 16), **conditions)


@torch.no_grad()
def test_stdit2_is_told_sizes_lengths_and_frame_rates():
    network = golden_network("stdit2_small")
    args, conditions = inputs("stdit2_small", "masked_text_4x4x4")
    before = network(*args, **conditions)
    for name, factor in (("fps", 2.0), ("width", 3.0), ("height", 3.0)):
        changed = network(*args, **conditions | {name: conditions[name] * factor})
        assert (changed - before).abs().max() > 1e-3, name
    network.fl_embedder.mlp[2].weight.zero_()
    assert (network(*args, **conditions) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "changes", "manifest"),
    [
        (STDiT, {"input_size": [16, 32, 32]}, "opensora_stdit1_xl_16x256x256"),
        (STDiT2, {}, "opensora_stdit2_xl"),
    ],
)
def test_the_published_network_has_the_tensors_of_its_file(kind, changes, manifest):
    manifest = load_manifest(manifest, "opensora")
    with torch.device("meta"):
        network = kind(**XL_2, **changes)
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    frozen = network.rope.freqs.numel() if kind is STDiT2 else 0  # theirs is a parameter
    assert sum(parameter.numel() for parameter in network.parameters()) + frozen == manifest["parameter_count"]


@pytest.mark.parametrize("case", ["stdit1_small", "stdit2_small"])
def test_in_a_new_network_attention_over_time_and_to_the_text_does_nothing(case):
    network = KINDS[case](**CASES[case][0]["constructor"])
    torch.manual_seed(0)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    (x, t, y), conditions = inputs(case, "no_text_mask")
    out = network(x, t, y, **conditions)
    torch.testing.assert_close(network(x, t, y + 1, **conditions), out)
    torch.testing.assert_close(out.flip(2), network(x.flip(2), t, y, **conditions))
    assert (network(x, t + 100, y, **conditions) - out).abs().max() > 1e-3


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("case", MASKED)
def test_checkpointing_changes_no_gradient(case, level):
    network = golden_network(case)
    args, conditions = inputs(case, MASKED[case])

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(network(*args, **conditions).square().sum(), list(network.parameters()))

    plain = gradients()
    network.set_activation_checkpointing(level)
    assert sum(block.checkpointed for block in network.blocks) == {1: 1, 3: 2}[level]
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_widths_that_cannot_be_divided_are_refused():
    for kind in (STDiT, STDiT2):
        with pytest.raises(ValueError, match="48 / 16 is no even width"):
            kind(hidden_size=48, num_heads=16)
    with pytest.raises(ValueError, match="hidden_size: 32; height, width and aspect ratio have a third each"):
        STDiT2(hidden_size=32, num_heads=4)
