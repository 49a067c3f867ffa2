"""Stage A against the reference implementation's numbers and diffusers, and what its training relies on."""

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from modules import stage_a
from modules.stage_a import StageA
from tests.golden import load_case, load_manifest, resolve, weights_of


def golden_model(case: str) -> tuple[StageA, dict, dict]:
    spec, tensors = load_case(case)
    model = StageA(**spec["constructor"]).eval()
    model.load_state_dict(weights_of(spec, tensors), strict=True)
    return model, spec, tensors


@torch.no_grad()
def computed(model: StageA, method: str, x: torch.Tensor, quantize: bool = False) -> list[torch.Tensor]:
    """What the published method returns, from ours."""
    if method == "decode":
        return [model.decode(x)]
    latents = model.encode(x)
    if method == "forward":
        return [model.decode(latents)]
    if not quantize:
        return [latents]
    quantised = model.quantise(latents)
    loss = 1.25 * quantised.commitment.mean()  # the published loss adds the same distance once more, for the codes
    return [quantised.latents, latents, quantised.indices, loss]


@pytest.mark.parametrize("case", ["stage_a_small", "stage_a_full_size"])
def test_golden_numbers(case):
    model, spec, tensors = golden_model(case)
    for call in spec["calls"]:
        mine = computed(model, call["method"], *resolve(call["args"], tensors), **call.get("kwargs", {}))
        result = resolve(call["result"], tensors)
        expected = [part for part in (result if isinstance(result, list) else [result]) if part is not None]
        assert len(mine) == len(expected)
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=call["result_stats"]["suggested_atol"])


def test_full_size_stage_a_has_the_published_names_and_shapes():
    spec = load_manifest("stage_a")
    with torch.device("meta"):
        model = StageA(**spec["constructor"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert sum(p.numel() for p in [*model.parameters(), model.codes]) == 18_406_894


def test_stage_a_agrees_with_diffusers():
    ours, _, _ = golden_model("stage_a_small")
    theirs = PaellaVQModel(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=48, scale_factor=0.43).eval()
    renamed = {name.replace("codebook", "embedding"): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    pictures = torch.rand(2, 3, 28, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents, expected = ours.encode(pictures), theirs.encode(pictures).latents  # diffusers' pipelines scale
        torch.testing.assert_close(latents * 0.43, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(expected).sample, rtol=0, atol=1e-5)
        codes, loss, (_, _, indices) = theirs.vquantizer(expected)
        quantised = ours.quantise(latents)
    assert torch.equal(quantised.indices.flatten(), indices.flatten())
    torch.testing.assert_close(quantised.latents * 0.43, codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(1.25 * quantised.commitment.mean(), loss, rtol=0, atol=1e-6)


def test_gradients_pass_the_codes_and_commitment_pulls_latents_to_them():
    model, _, _ = golden_model("stage_a_small")
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantised = model.quantise(latents)
    codes, weight = model.codes[quantised.indices].permute(0, 3, 1, 2), torch.randn_like(latents)
    torch.testing.assert_close(quantised.latents, codes / 0.43)
    (through,) = torch.autograd.grad((quantised.latents * weight).sum(), latents, retain_graph=True)
    torch.testing.assert_close(through, weight)

    difference = latents.detach() * 0.43 - codes
    torch.testing.assert_close(quantised.commitment, difference.square().mean(dim=(1, 2, 3)))
    (pull,) = torch.autograd.grad(quantised.commitment.sum(), latents)
    torch.testing.assert_close(pull, 2 * 0.43 * difference / (4 * 3 * 5))  # a mean over each sample


def test_training_chooses_which_samples_are_rebuilt_from_codes():
    model, _, _ = golden_model("stage_a_small")
    pictures = smooth_pictures(2)
    with torch.no_grad():
        whole, latents, found = model(pictures)
        mixed, *_ = model(pictures, quantised=torch.tensor([True, False]))
        torch.testing.assert_close(latents, model.encode(pictures))
        torch.testing.assert_close(whole, model.decode(found.latents))
        torch.testing.assert_close(mixed[0], whole[0])
        torch.testing.assert_close(mixed[1:], model.decode(latents[1:]))
    assert (mixed[1] - whole[1]).abs().max() > 0.01


def test_the_search_in_chunks_finds_the_nearest_code(monkeypatch):
    monkeypatch.setattr(stage_a, "TABLE_ENTRIES", 7 * 50)
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(50, 4, generator=generator)
    distances = (x[..., None, :].double() - codes.double()).square().sum(-1)
    assert torch.equal(stage_a.nearest(x, codes), distances.argmin(-1))


def mini() -> StageA:
    torch.manual_seed(0)
    return StageA(levels=2, bottleneck_blocks=1, c_hidden=16, codebook_size=512)


def smooth_pictures(count: int) -> torch.Tensor:
    """Colour gradients with a bright square, (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 3, 2, 2, generator=generator)
    pictures = torch.nn.functional.interpolate(corners, size=16, mode="bilinear")
    for picture, (row, column) in zip(pictures, torch.randint(0, 12, (count, 2), generator=generator), strict=True):
        picture[:, row : row + 4, column : column + 4] = torch.rand(3, 1, 1, generator=generator)
    return pictures


@pytest.mark.integration
def test_a_fresh_stage_a_learns_and_uses_its_codes():
    model, pictures = mini(), smooth_pictures(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        rebuilt, _, quantised = model(pictures)
        error = (rebuilt - pictures).square().mean()
        loss = error + 0.25 * quantised.commitment.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error < 0.2 * pictures.var()  # with the codes that it started with
    assert quantised.indices.unique().numel() > 100  # of at most 512 positions


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    model, _, _ = golden_model("stage_a_small")
    model.train()
    gradients, kept_bytes = [], []
    for level in (0, 1, 3):
        model.set_activation_checkpointing(level)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            rebuilt, _, quantised = model(smooth_pictures(2))
        model.zero_grad()
        (rebuilt.square().mean() + quantised.commitment.mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept_bytes.append(sum(sizes))
    assert kept_bytes[2] < kept_bytes[1] < kept_bytes[0]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_a_stage_a_made_on_the_meta_device_can_be_initialised():
    with torch.device("meta"):
        model = mini()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert model.down_blocks[-1][1].num_batches_tracked == 0


def test_bfloat16_weights_work_without_autocast():
    model, _, _ = golden_model("stage_a_small")
    pictures = smooth_pictures(2)
    with torch.no_grad():
        expected = model.decode(model.encode(pictures))
        model.bfloat16()
        mine = model.decode(model.encode(pictures))
        model.quantise(model.encode(pictures))
    assert mine.dtype == torch.bfloat16
    assert (mine - expected).abs().mean() < 0.03


def test_pictures_that_do_not_fit_are_told_so():
    with pytest.raises(ValueError, match=r"18 x 20 pixels: .* multiples of 4"):
        mini().encode(torch.zeros(1, 3, 18, 20))
