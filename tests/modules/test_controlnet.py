"""The ControlNet adapter against the reference implementation's numbers, and beside Stage C."""

import pytest
import torch

from modules.controlnet import ControlNet
from modules.effnet import IMAGE_MEAN, EfficientNetEncoder, normalise_images
from tests.golden import load_case, load_manifest, resolve, weights_of
from tests.modules.test_stage_c import golden_model, small_inputs

CASES = [
    "effnet_1_channel",
    "effnet_3_channels",
    "effnet_4_channels",
    "simple",
    pytest.param("large", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(case):
    spec, tensors = load_case(f"controlnet_{case}")
    with torch.device("meta"):
        model = ControlNet(**spec["constructor"], official_stem=True)
    model.load_state_dict(weights_of(spec, tensors), strict=True, assign=True)
    for call in spec["calls"]:
        with torch.no_grad():
            mine = model(*resolve(call["args"], tensors))
        expected = resolve(call["result"], tensors)
        assert [residual is None for residual in mine] == [residual is None for residual in expected]
        pairs = [pair for pair in zip(mine, expected, strict=True) if pair[0] is not None]
        assert pairs
        for residual, wanted in pairs:
            torch.testing.assert_close(residual, wanted, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("canny", 54_255_776),
        ("inpainting", 54_256_424),
        ("identity", 102_763_008),
        ("super_resolution", 203_491_584),
    ],
)
def test_full_size_adapters_have_the_published_names_and_shapes(name, parameters):
    spec = load_manifest(f"controlnet_{name}")
    with torch.device("meta"):
        model = ControlNet(**spec["constructor"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters


STAGES = (("fused", 1, 3, 2, 8, 8, 1), ("fused", 1, 3, 2, 8, 8, 1), ("fused", 1, 3, 2, 8, 8, 1))


def small_adapter(**changes) -> ControlNet:
    return ControlNet(**{"c_in": 1, "c_proj": 64, "proj_blocks": [1, 4], "stages": STAGES} | changes)


@pytest.mark.bits
def test_a_new_adapter_changes_nothing():
    generator, _, _ = golden_model("stage_c_small")
    inputs = small_inputs()
    with torch.no_grad():
        residuals = small_adapter()(torch.rand(2, 1, 64, 48))
        assert torch.equal(generator(**inputs, cnet=residuals), generator(**inputs))


def awake(adapter: ControlNet) -> ControlNet:
    """An adapter after some training."""
    torch.manual_seed(1)
    for projection in adapter.projections:
        torch.nn.init.normal_(projection[-1].weight, std=0.1)
    return adapter


def test_gradients_reach_every_weight_of_the_adapter_and_none_of_the_frozen_generator():
    generator, _, _ = golden_model("stage_c_small")
    generator.requires_grad_(False)
    adapter, built = awake(small_adapter()).train(), []
    for block in generator.blocks:
        block.register_forward_hook(lambda block, args, x: built.append(x.grad_fn is not None))
    generator(**small_inputs(), cnet=adapter(torch.rand(2, 1, 64, 48))).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in generator.parameters())
    # Each convolution block is followed by a timestep and an attention block: three blocks come before number 1.
    assert built == [False] * 3 + [True] * (len(generator.blocks) - 3)


@pytest.mark.bits
def test_residuals_are_counted_as_blocks_run():
    generator, spec, tensors = golden_model("stage_c_variants")
    widths = generator.residual_widths
    call = next(call for call in spec["calls"] if call["method"] == "forward" or call["method"] == "__call__")
    args, kwargs = resolve(call.get("args", []), tensors), resolve(call.get("kwargs", {}), tensors)
    kwargs.pop("cnet", None)

    def moved_by(number: int) -> bool:
        residual = torch.ones(1, widths[min(number, len(widths) - 1)], 2, 2)
        with torch.no_grad():
            controlled = generator(*args, **kwargs, cnet=[None] * number + [residual])
            return not torch.equal(controlled, generator(*args, **kwargs))

    assert [moved_by(number) for number in range(len(widths) + 1)] == [True] * len(widths) + [False]


def test_it_starts_as_the_encoder_sees():
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(stages=STAGES).eval()
    for norm in encoder.backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
    grey, rgb = torch.rand(2, 1, 64, 48), torch.rand(2, 3, 64, 48)
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    seen = {1: (grey, grey + mean), 3: (rgb, rgb), 4: (torch.cat([rgb, grey], dim=1), rgb)}
    for c_in, (condition, picture) in seen.items():
        adapter = small_adapter(c_in=c_in)
        adapter.start_from_encoder(encoder.state_dict())
        with torch.no_grad():
            mine, expected = adapter.backbone[0](condition), encoder.backbone[0](normalise_images(picture))
            # At the edge, the padding of one is black and that of the other grey.
            torch.testing.assert_close(mine[..., 1:, 1:], expected[..., 1:, 1:], rtol=0, atol=1e-4)
            torch.testing.assert_close(adapter.backbone[1:](expected), encoder.backbone[1:](expected))


@pytest.mark.bits
def test_training_leaves_the_norms_of_the_backbone_alone():
    adapter, condition = awake(small_adapter()), torch.rand(2, 1, 64, 64)
    before = {name: buffer.clone() for name, buffer in adapter.named_buffers()}
    with torch.no_grad():
        training, drawing = adapter.train()(condition), adapter.eval()(condition)
    assert torch.equal(training[1], drawing[1])
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapter.named_buffers())


@pytest.mark.bits
@pytest.mark.parametrize("mode", ["effnet", "simple"])
def test_recomputing_activations_changes_no_gradient(mode):
    adapter = awake(small_adapter(bottleneck_mode=mode, c_in=8))
    condition, gradients = torch.rand(2, 8, 32, 32), []
    for level in (0, 1):
        adapter.zero_grad()
        adapter.set_activation_checkpointing(level)
        sum(r.square().mean() for r in adapter(condition) if r is not None).backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_residuals_lie_on_the_positions_of_stage_c():
    residuals = small_adapter(patch_size=2)(torch.rand(1, 1, 64, 128))
    assert residuals[1].shape == (1, 64, 2, 4)  # 16 px per feature, 2 x 2 features per position


def test_wrong_arguments_are_named():
    for blocks in ([], [1, 1], [-1, 2]):
        with pytest.raises(ValueError, match="proj_blocks"):
            small_adapter(proj_blocks=blocks)
    with pytest.raises(ValueError, match=r"'efnet' does not exist: effnet, simple, large"):
        small_adapter(bottleneck_mode="efnet")
