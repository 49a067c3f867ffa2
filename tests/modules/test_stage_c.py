"""Stage C against the reference implementation's numbers, and what the engine relies on."""

import pytest
import torch

from modules.stage_c import StageC
from tests.golden import load_case, load_manifest, resolve, weights_of

CASES = ["stage_c_small", "stage_c_variants"]


def golden_model(case: str) -> tuple[StageC, dict, dict]:
    spec, tensors = load_case(case)
    model = StageC(**spec["constructor"]).eval()
    model.load_state_dict(weights_of(spec, tensors), strict=True)
    return model, spec, tensors


def golden_calls() -> list[tuple[str, str]]:
    return [(case, call["name"]) for case in CASES for call in load_case(case)[0]["calls"]]


@pytest.mark.parametrize(("case", "name"), golden_calls())
def test_stage_c_computes_the_golden_numbers(case, name):
    model, spec, tensors = golden_model(case)
    call = next(call for call in spec["calls"] if call["name"] == name)
    with torch.no_grad():
        mine = getattr(model, call["method"])(
            *resolve(call.get("args", []), tensors), **resolve(call.get("kwargs", {}), tensors)
        )
    expected, stats = resolve(call["result"], tensors), call["result_stats"]
    if name == "r_embedding":  # sine and cosine of equal angles: instruction sets differ in their last bits only
        torch.testing.assert_close(mine, expected, rtol=0, atol=3e-7)
    torch.testing.assert_close(
        mine, expected, rtol=0, atol=stats.get("suggested_atol_with_the_same_r_embedding", stats["suggested_atol"])
    )


@pytest.mark.parametrize(("manifest", "parameters"), [("stage_c_3.6B", 3_589_103_632), ("stage_c_1B", 1_030_785_040)])
def test_full_size_stage_c_has_the_published_names_and_shapes(manifest, parameters):
    spec = load_manifest(manifest)
    with torch.device("meta"):
        model = StageC(**spec["constructor"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters


def small_inputs(seed: int = 0, **shapes) -> dict[str, torch.Tensor]:
    """Inputs of the golden small Stage C."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (2, 16, 6, 4),
        "clip_text": (2, 5, 48),
        "clip_text_pooled": (2, 1, 40),
        "clip_img": (2, 1, 24),
    } | shapes
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"r": torch.tensor([0.3, 0.8])}


def test_stage_c_agrees_with_diffusers():
    from diffusers import StableCascadeUNet
    from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

    model, _, _ = golden_model("stage_c_small")
    theirs = StableCascadeUNet(
        conditioning_dim=64,
        block_out_channels=(64, 64),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_in_channels=48,
        clip_text_pooled_in_channels=40,
        clip_image_in_channels=24,
        switch_level=(False,),
    ).eval()
    theirs.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(model.state_dict()), strict=True)
    inputs = small_inputs()
    with torch.no_grad():
        mine = model(**inputs)
        sample, ratio = inputs.pop("x"), inputs.pop("r")
        expected = theirs(sample, ratio, **inputs).sample
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def test_pooled_text_without_a_token_axis_is_one_token():
    model, _, _ = golden_model("stage_c_small")
    inputs = small_inputs()
    expected = model(**inputs)
    inputs |= {name: inputs[name].squeeze(1) for name in ("clip_text_pooled", "clip_img")}
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-6)


def test_an_unknown_condition_is_named():
    model, _, _ = golden_model("stage_c_small")
    with pytest.raises(ValueError, match=r"no condition named 'effnet'; it takes .*clip_text.*sca, crp"):
        model(**small_inputs(), effnet=torch.zeros(2))


def test_bfloat16_weights_work_without_autocast():
    model, spec, tensors = golden_model("stage_c_small")
    call = spec["calls"][1]
    with torch.no_grad():
        mine = model.bfloat16()(**resolve(call["kwargs"], tensors))
    assert mine.dtype == torch.bfloat16
    # The error stays that of bfloat16 (8 bits); a time embedding made in bfloat16 would be off by 1.
    assert (mine - resolve(call["result"], tensors)).abs().mean() < 0.03


@pytest.mark.parametrize("case", ["stage_c_small", "stage_c_variants"])
def test_checkpointing_levels_keep_less_and_give_the_same_gradients(case):
    model, spec, tensors = golden_model(case)
    model.train()
    inputs = resolve(spec["calls"][0]["kwargs"], tensors)
    gradients, kept_bytes = [], []
    for level in range(4):
        model.set_activation_checkpointing(level)
        sizes = []
        torch.manual_seed(0)  # dropout draws the same again while activations are recomputed
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            loss = model(**inputs).square().mean()
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        kept_bytes.append(sum(sizes))
    assert kept_bytes == sorted(kept_bytes, reverse=True)
    assert kept_bytes[3] < kept_bytes[0] / 4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="level 4"):
        model.set_activation_checkpointing(4)


@pytest.mark.slow
def test_stage_c_compiles_whole_and_block_by_block():
    spec, _ = load_case("stage_c_small")
    model = StageC(**{**spec["constructor"], "blocks": [[1, 1], [1, 1]], "dropout": 0.0})
    torch.nn.init.normal_(model.clf[1].weight)
    inputs = small_inputs()
    expected = model(**inputs)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(**inputs), expected, rtol=0, atol=1e-5)

    model.set_activation_checkpointing(3)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = model(**inputs)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    compiled.mean().backward()


def test_a_network_made_on_the_meta_device_can_be_initialised():
    spec, _ = load_case("stage_c_variants")
    with torch.device("meta"):
        model = StageC(**spec["constructor"])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_blocks_never_copy_activations_to_another_layout():
    model, _, _ = golden_model("stage_c_small")
    x = torch.randn(2, 6, 4, 64)
    depthwise = model.blocks[0].depthwise(x)
    assert depthwise.shape == x.shape
    assert depthwise.is_contiguous()
    expected = torch.nn.Conv2d.forward(model.blocks[0].depthwise, x.permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(depthwise, expected.permute(0, 2, 3, 1))


@pytest.mark.integration
def test_a_fresh_stage_c_predicts_zero_and_learns():
    model = StageC(
        patch_size=2, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 2], [2, 1]], c_cond=32, c_clip_text=48,
        c_clip_text_pooled=40, c_clip_img=24, dropout=0.0,
    )  # fmt: skip
    inputs = small_inputs()
    assert model(**inputs).abs().max() == 0
    target = torch.randn_like(inputs["x"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (model(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_settings_that_do_not_fit_the_levels_are_named():
    with pytest.raises(ValueError, match="2 levels"):
        StageC(c_hidden=[8, 8], nhead=[2], blocks=[[1, 1], [1, 1]])
    with pytest.raises(ValueError, match="'X' is no kind of block"):
        StageC(c_hidden=[8], nhead=[2], blocks=[[1], [1]], level_config=["CXA"])
    with pytest.raises(ValueError, match="3 attention heads do not divide 8"):
        StageC(c_hidden=[8], nhead=[3], blocks=[[1], [1]])
