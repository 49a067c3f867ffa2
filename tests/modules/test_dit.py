"""DiT and Latte predict what the reference does, on grids of any size, and their state is that of published files."""

import pytest
import torch

from modules.dit import DiT, grid_positions
from tests.golden import load_case, load_manifest, resolve, weights_of


def golden_network(case: str) -> tuple[DiT, dict, dict]:
    """The small network of a case, whose state needs nothing else than the weights of the case."""
    spec, tensors = load_case(f"opensora/{case}")
    numbers = dict(spec["constructor"])
    frames, *size = numbers.pop("input_size")
    classes = int(numbers.pop("condition").removeprefix("label_"))
    numbers.pop("no_temporal_pos_emb", None)
    is_latte = case.startswith("latte")
    network = DiT(size, num_classes=classes, num_frames=frames if is_latte else None, **numbers)
    weights = weights_of(spec, tensors)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :, 0]  # published ones have no frames
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == ({"pos_embed", "temp_embed"} if is_latte else {"pos_embed"})
    return network, spec, tensors


@pytest.mark.parametrize("case", ["dit_class_small", "latte_class_small"])
@torch.no_grad()
def test_it_predicts_what_the_reference_does(case):
    network, spec, tensors = golden_network(case)
    call = spec["calls"][0]
    latents, times, labels = resolve(call["args"], tensors)
    expected = resolve(call["result"], tensors)
    if network.num_frames is None:
        latents, expected = latents[:, :, 0], expected[:, :, 0]
    found = network(latents, times, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


def test_positions_are_those_of_the_reference():
    network, _, tensors = golden_network("dit_class_small")
    torch.testing.assert_close(network.pos_embed, tensors["out.pos_embed_spatial"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_other_sizes_than_the_constructor_s_have_their_own_positions():
    square, spec, tensors = golden_network("dit_class_small")
    numbers = {"hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 10}
    wide = DiT((4, 12), **numbers)
    wide.load_state_dict(weights_of(spec, tensors) | {"pos_embed": wide.pos_embed} | {
        "x_embedder.proj.weight": square.x_embedder.proj.weight
    })  # fmt: skip
    latents = torch.randn(2, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    given = latents, torch.tensor([5, 900]), torch.tensor([1, 10])
    assert torch.equal(square(*given), wide(*given))
    assert torch.equal(wide.pos_embed[0, 0], grid_positions((2, 6), 48)[0, 0])
    assert not torch.equal(wide.pos_embed[0, 1], wide.pos_embed[0, 6])  # the next column, the next row


@torch.no_grad()
def test_clips_of_a_latte_may_be_shorter_than_those_of_its_constructor():
    network, _, tensors = golden_network("latte_class_small")
    clip = tensors["in.forward.args.0"][:, :, :2]
    found = network(clip, torch.tensor([731, 12]), torch.tensor([3, 10]))
    assert found.shape == (2, 8, 2, 8, 8)


@pytest.mark.parametrize("size", ["256x256", "512x512"])
def test_the_published_network_has_the_tensors_of_its_file(size):
    manifest = load_manifest(f"dit_xl_2_{size}", "opensora")
    with torch.device("meta"):
        network = DiT(input_size=int(size[:3]) // 8)
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"] == 674_834_720
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == manifest["parameters_with_positions"]


def test_a_new_network_predicts_nothing_and_every_block_is_the_identity():
    network = DiT(8, hidden_size=48, depth=2, num_heads=4, num_classes=3)
    given = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3])
    assert not network(*given).any()
    tokens, condition = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(network.blocks[0](tokens, condition), tokens)


@pytest.mark.parametrize("level", [1, 3])
def test_checkpointing_changes_no_gradient(level):
    network, spec, tensors = golden_network("dit_class_small")
    latents, times, labels = resolve(spec["calls"][0]["args"], tensors)

    def gradients() -> list[torch.Tensor]:
        loss = network(latents[:, :, 0], times, labels).square().sum()
        return torch.autograd.grad(loss, list(network.parameters()))

    plain = gradients()
    network.set_activation_checkpointing(level)
    assert sum(block.checkpointed for block in network.blocks) == {1: 2, 3: 3}[level]
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_cut_into_patches_is_refused():
    network = DiT(8, hidden_size=48, depth=1, num_heads=4, num_classes=3)
    with pytest.raises(ValueError, match="sides are multiples of 2"):
        network(torch.zeros(1, 4, 8, 7), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="clips of a Latte 5"):
        network(torch.zeros(1, 4, 2, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="patch_size 2 does not divide 7 x 8"):
        DiT((7, 8))
    with pytest.raises(ValueError, match="num_heads"):
        DiT(8, hidden_size=50, num_heads=4)
