"""STDiT3 predicts what the reference does, whatever is masked, and its state is that of published files."""

import pytest
import torch
from torch import Tensor

from modules.dit import grid_positions
from modules.stdit3 import SIZES, STDiT3
from modules.stdit_parts import rotate
from tests.golden import load_case, load_manifest, resolve, weights_of

SMALL = "stdit3_small"
CASES = {case: load_case(f"opensora/{case}") for case in (SMALL, "stdit3_no_qk_norm", "stdit3_patch_2x2x2_in_8")}
CALLS = {case: {call["name"]: call for call in spec["calls"]} for case, (spec, _) in CASES.items()}
FORWARDS = [
    (case, name) for case, calls in CALLS.items() for name, call in calls.items() if call["method"] == "__call__"
]


def golden_network(case: str = SMALL) -> STDiT3:
    spec, tensors = CASES[case]
    network = STDiT3(**spec["constructor"])
    network.load_state_dict(weights_of(spec, tensors, computed={"rope.freqs": network.rope.freqs}))
    return network


def inputs(case: str, name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional ones and conditions of a call; a condition has a row for each sample."""
    x, t, y = resolve(CALLS[case][name]["args"], CASES[case][1])
    given = resolve(CALLS[case][name]["kwargs"], CASES[case][1])
    del given["num_frames"], given["ar"]  # ignored by the reference
    return [x, t, y[:, 0]], {
        key: rows.repeat(len(x) // len(rows), *[1] * (rows.dim() - 1)) for key, rows in given.items()
    }


@pytest.mark.parametrize(("case", "name"), FORWARDS)
@torch.no_grad()
def test_it_predicts_what_the_reference_does(case, name):
    args, conditions = inputs(case, name)
    found, call = golden_network(case)(*args, **conditions), CALLS[case][name]
    expected = resolve(call["result"], CASES[case][1])
    if (
        "x_mask" in conditions
    ):  # the reference modulates given frames twice at the end; nobody uses what it gives there
        noised = conditions["x_mask"].repeat_interleave(golden_network(case).patch_size[0], dim=1)[:, : found.shape[2]]
        found, expected = (clip.transpose(1, 2)[noised] for clip in (found, expected))
        assert found.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@torch.no_grad()
def test_embeddings_are_those_of_the_reference():
    network, (_, tensors) = golden_network(), CASES[SMALL]

    def agrees(found: Tensor, name: str):
        atol = CALLS[SMALL][name]["result_stats"]["suggested_atol"]
        torch.testing.assert_close(found, tensors[f"out.{name}"], rtol=0, atol=atol)

    agrees(network.t_embedder(tensors["in.t_embedder.args.0"]), "t_embedder")
    agrees(network.fps_embedder(tensors["in.fps_embedder.args.0"][:, 0]), "fps_embedder")
    agrees(network.y_embedder(tensors["in.y_embedder.args.0"][:, 0])[:, None], "y_embedder")
    text, dropped = (tensors[f"in.y_embedder_forced_drop.args.{i}"] for i in (0, 2))
    agrees(network.y_embedder(text[:, 0], dropped == 1)[:, None], "y_embedder_forced_drop")
    agrees(rotate(tensors["in.rope.args.0"], network.rope(6)), "rope")
    for grid in ((3, 5), (4, 4), (15, 27)):
        name = "pos_embed_{}x{}".format(*grid)
        numbers = CALLS[SMALL][name]["kwargs"]
        spacing = [numbers["base_size"] / side / numbers["scale"] for side in grid]
        agrees(grid_positions(grid, 48, spacing=spacing), name)


@torch.no_grad()
def test_given_frames_are_those_at_timestep_0_and_each_frame_may_have_its_own():
    network = golden_network()
    (x, t, y), conditions = inputs(SMALL, "x_mask_5x4x4")
    x_mask = conditions.pop("x_mask")
    by_frame = network(x, torch.where(x_mask, t[:, None], 0), y, **conditions)
    assert torch.equal(network(x, t, y, x_mask=x_mask, **conditions), by_frame)
    alike = network(x, t[:, None].expand(-1, 5), y, **conditions)
    torch.testing.assert_close(alike, network(x, t, y, **conditions))
    assert (alike - by_frame).abs().max() > 0.1
    assert torch.equal(network(x, t, y, target_alone=True, **conditions), network(x, t, y, **conditions)[:, :4])


@torch.no_grad()
def test_text_that_does_not_count_has_no_influence_and_a_dropped_caption_is_the_empty_text():
    network = golden_network()
    (x, t, y), conditions = inputs(SMALL, "masked_text_3x6x5")
    other = torch.where(conditions["mask"][:, :, None] == 1, y, y + 7)
    assert not torch.equal(other, y)
    torch.testing.assert_close(network(x, t, other, **conditions), network(x, t, y, **conditions))
    dropped = network(x, t, y, dropped=torch.tensor([True, False]), **conditions)
    empty = torch.stack([network.y_embedder.y_embedding, y[1]])
    assert torch.equal(dropped, network(x, t, empty, **conditions))
    with pytest.raises(ValueError, match="text of 9 tokens: model_max_length is 8"):
        network(x, t, torch.zeros(2, 9, 16), **conditions)


@pytest.mark.parametrize(("size", "manifest"), [("XL/2", "opensora_stdit3_xl"), ("3B/2", "opensora_stdit3_3b")])
def test_the_published_network_has_the_tensors_of_its_file(size, manifest):
    manifest = load_manifest(manifest, "opensora")
    with torch.device("meta"):
        network = STDiT3(**SIZES[size])
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    trained = sum(parameter.numel() for parameter in network.parameters())
    assert trained + network.rope.freqs.numel() == manifest["parameter_count"]  # theirs is a parameter, and frozen


def test_in_a_new_network_temporal_blocks_do_nothing_and_the_frame_rate_has_no_influence():
    network = STDiT3(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=8)
    x, y, time = torch.randn(2, 3, 4, 48), torch.randn(2, 8, 48), torch.randn(2, 1, 6, 48)
    spatial, temporal = network.blocks
    assert torch.equal(temporal(x, y, None, time, network.rope(3)), x)
    assert not torch.equal(spatial(x, y, None, time, network.rope(3)), x)
    assert not network.fps_embedder(torch.tensor([24.0, 120.0])).any()


@pytest.mark.parametrize("level", [1, 3])
def test_checkpointing_changes_no_gradient(level):
    network = golden_network()
    args, conditions = inputs(SMALL, "x_mask_3x6x5")

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(network(*args, **conditions).square().sum(), list(network.parameters()))

    plain = gradients()
    network.set_activation_checkpointing(level)
    assert sum(block.checkpointed for block in network.blocks) == {1: 2, 3: 4}[level]
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_positions_in_time_stay_in_float32_in_a_network_of_16_bits():
    network = golden_network()
    exact = network.rope(120)
    assert torch.equal(network.to(torch.bfloat16).rope(120), exact)


def test_heads_that_cannot_be_rotated_are_refused():
    with pytest.raises(ValueError, match="48 / 16 is no even width"):
        STDiT3(hidden_size=48, num_heads=16)
