"""Stage B against the reference implementation's numbers and diffusers, and what the engine relies on."""

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

from modules.stage_b import StageB
from tests.golden import load_case, load_manifest, resolve, weights_of

CASES = ["stage_b_small"]


def golden_model(case: str) -> tuple[StageB, dict, dict]:
    spec, tensors = load_case(case)
    model = StageB(**spec["constructor"]).eval()
    model.load_state_dict(weights_of(spec, tensors), strict=True)
    return model, spec, tensors


def golden_calls() -> list[tuple[str, str]]:
    return [(case, call["name"]) for case in CASES for call in load_case(case)[0]["calls"]]


@pytest.mark.parametrize(("case", "name"), golden_calls())
def test_stage_b_computes_the_golden_numbers(case, name):
    model, spec, tensors = golden_model(case)
    call = next(call for call in spec["calls"] if call["name"] == name)
    with torch.no_grad():
        mine = model(**resolve(call["kwargs"], tensors))
    # The tighter of the two tolerances: the time embedding is golden's to the bit (see the tests of Stage C).
    atol = call["result_stats"]["suggested_atol_with_the_same_r_embedding"]
    torch.testing.assert_close(mine, resolve(call["result"], tensors), rtol=0, atol=atol)


@pytest.mark.parametrize(("manifest", "parameters"), [("stage_b_3B", 1_562_941_136), ("stage_b_700M", 699_471_248)])
def test_full_size_stage_b_has_the_published_names_and_shapes(manifest, parameters):
    spec = load_manifest(manifest)
    with torch.device("meta"):
        model = StageB(**spec["constructor"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_defaults_are_the_3b():
    with torch.device("meta"):
        assert sum(p.numel() for p in StageB().parameters()) == 1_562_941_136


def small_inputs() -> dict[str, torch.Tensor]:
    """Inputs of the golden small Stage B, with sides that do not halve evenly."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 4, 24, 20), "effnet": (2, 16, 4, 3), "clip": (2, 1, 40), "pixels": (2, 3, 10, 8)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"r": torch.tensor([0.3, 0.8])}


def diffusers_network(weights: dict[str, torch.Tensor]) -> StableCascadeUNet:
    """The golden small Stage B in diffusers, with weights of ours by diffusers' own conversion."""
    convolution, attention = ("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeAttnBlock",)
    network = StableCascadeUNet(
        in_channels=4, out_channels=4, patch_size=2, conditioning_dim=32, block_out_channels=(16, 24, 32, 32),
        num_attention_heads=(-1, -1, 2, 4), down_num_layers_per_block=(1, 1, 2, 1),
        up_num_layers_per_block=(1, 2, 1, 1), down_blocks_repeat_mappers=(1, 1, 1, 1),
        up_blocks_repeat_mappers=(3, 3, 2, 2),
        block_types_per_layer=(convolution, convolution, convolution + attention, convolution + attention),
        clip_text_pooled_in_channels=40, effnet_in_channels=16, pixel_mapper_in_channels=3, dropout=(0.0,) * 4,
        timestep_conditioning_type=("sca",),
    )  # fmt: skip
    network.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights), strict=True)
    return network


@pytest.mark.parametrize("with_pixels", [True, False])
def test_outputs_and_an_update_equal_those_of_diffusers(with_pixels):
    model, _, _ = golden_model("stage_b_small")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = diffusers_network(before)
    inputs = small_inputs()
    if not with_pixels:
        del inputs["pixels"]
    renamed = {"x": "sample", "r": "timestep_ratio", "clip": "clip_text_pooled"}

    mine = model(**inputs)
    expected = theirs(**{renamed.get(name, name): tensor for name, tensor in inputs.items()}).sample
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)

    target = torch.randn_like(mine)
    for network, prediction in ((model, mine), (theirs, expected)):
        (prediction - target).square().mean().backward()
        # Some gradients are 0 but for rounding (biases of keys), which a smaller eps would turn into steps.
        torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-7).step()
    after = convert_stable_cascade_unet_single_file_to_diffusers(model.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    still = [name for name, tensor in model.state_dict().items() if (tensor - before[name]).abs().max() < 9e-4]
    # Without pixels only the biases behind a picture of zeros learn.
    assert still == ([] if with_pixels else ["pixels_mapper.0.weight"])


def test_pooled_text_without_a_token_axis_is_one_token():
    model, _, _ = golden_model("stage_b_small")
    inputs = small_inputs()
    expected = model(**inputs)
    inputs["clip"] = inputs["clip"].squeeze(1)
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-6)


def test_an_unknown_condition_is_named():
    model, _, _ = golden_model("stage_b_small")
    with pytest.raises(ValueError, match=r"StageB has no condition named 'crp'; it takes effnet, clip, pixels, sca"):
        model(**small_inputs(), crp=torch.zeros(2))


def test_bfloat16_weights_work_without_autocast():
    model, spec, tensors = golden_model("stage_b_small")
    call = next(call for call in spec["calls"] if call["name"] == "with_pixels_24x40")
    with torch.no_grad():
        mine = model.bfloat16()(**resolve(call["kwargs"], tensors))
    assert mine.dtype == torch.bfloat16
    # The error stays that of bfloat16 (8 bits); a time embedding made in bfloat16 would be off by 1.
    assert (mine - resolve(call["result"], tensors)).abs().mean() < 0.03


def test_checkpointing_levels_keep_less_and_give_the_same_gradients():
    model, _, _ = golden_model("stage_b_small")
    gradients, kept_bytes = [], []
    for level in range(4):
        model.set_activation_checkpointing(level)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            loss = model(**small_inputs()).square().mean()
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept_bytes.append(sum(sizes))
    assert kept_bytes == sorted(kept_bytes, reverse=True)
    assert kept_bytes[3] < kept_bytes[0] / 3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_a_stage_b_made_on_the_meta_device_can_be_initialised():
    spec, _ = load_case("stage_b_small")
    with torch.device("meta"):
        model = StageB(**spec["constructor"])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.integration
def test_a_fresh_stage_b_predicts_zero_and_learns_from_its_conditions():
    torch.manual_seed(0)
    model = StageB(
        c_cond=32, c_hidden=[16, 32], nhead=[-1, 2], blocks=[[1, 1], [1, 1]], block_repeat=[[1, 1], [1, 1]],
        level_config=["CT", "CTA"], c_clip=40,
    )  # fmt: skip
    inputs = small_inputs()
    assert model(**inputs).abs().max() == 0
    # What the noised latents do not show: it has to come from the latents of the encoder.
    target = torch.nn.functional.interpolate(inputs["effnet"][:, :4], size=(24, 20), mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = (model(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.var()


def test_settings_that_do_not_fit_the_levels_are_named():
    with pytest.raises(ValueError, match=r"StageB has 2 levels \(c_hidden\), but \['CT'\] sets 1 of them"):
        StageB(
            c_hidden=[8, 8], nhead=[-1, 2], blocks=[[1, 1], [1, 1]], block_repeat=[[1, 1], [1, 1]], level_config=["CT"]
        )
