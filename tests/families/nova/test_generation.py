"""Whole drawings with NOVA are those of the reference for its draws, with guidance in all its forms."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from families.nova import generation
from families.nova.generation import Drawing, SeededDraws, draw_frames
from families.nova.guidance import TokenGuidance
from families.nova.loss import process
from families.nova.masks import group_sizes
from modules.nova_decoder import patchify
from tests.golden import resolve
from tests.small_nova import golden_nova, load_nova
from warpcore.random import SampleRandom

CASES = ("sample_t2i", "sample_t2v", "sample_rope")
DRAWINGS = [(case, name) for case in CASES for name in load_nova(case)[0]]


class RecordedDraws:
    """Those of the reference, in its order."""

    def __init__(self, draws: dict):
        self.recorded = draws["order_uniform"][..., 0]
        self.noises, self.step_noises = iter(draws["noise"]), iter(draws.get("step_noise", []))

    def order(self, tokens: int) -> Tensor:
        return self.recorded

    def noise(self, frame: int, group: int, shape: tuple[int, int]) -> Tensor:
        return patchify(next(self.noises), 2)

    def step_noise(self, frame: int, group: int, step: int, shape: tuple[int, int]) -> Tensor:
        return patchify(next(self.step_noises), 2)


def guidance_of(numbers: dict) -> TokenGuidance:
    return TokenGuidance(
        numbers["guidance_scale"],
        numbers.get("min_guidance_scale"),
        numbers.get("guidance_trunc", 0.0),
        numbers.get("guidance_renorm", 1.0),
        numbers.get("image_guidance_scale"),
    )


@pytest.mark.parametrize(("case", "name"), DRAWINGS)
@torch.no_grad()
def test_a_drawing_is_that_of_the_reference(case, name, monkeypatch):
    calls, tensors = load_nova(case)
    call, network = calls[name], golden_nova(case)
    given, expected = resolve(call["kwargs"], tensors), resolve(call["result"], tensors)
    monkeypatch.setattr(generation, "group_sizes", lambda tokens, steps: given["num_preds"])
    scheduler = call["sample_scheduler"]
    flow = scheduler["class"].startswith("FlowMatch")
    diffusion = process("flow", scheduler["kwargs"]["shift"]) if flow else process("ddpm")
    prompts = given["prompt"]
    flow = torch.tensor(given["motion_flow"] * (len(prompts) // 2)) if "motion_flow" in given else None
    flow = None if flow is None else flow[: len(prompts)]
    condition = network.condition(prompts, torch.full((len(prompts),), prompts.shape[1]), flow=flow)
    condition, unconditional = condition[:2], condition[2:]
    seen = []
    network.image_encoder.register_forward_hook(lambda _, given, made: seen.append(made))
    drawing = Drawing(len(given["num_preds"]), given["num_diffusion_steps"], guidance_of(given))
    (first,) = given.get("latents", [None])
    draws = RecordedDraws(resolve(call["draws"], tensors))
    frames = list(
        draw_frames(
            network, diffusion, drawing, draws, given["max_latent_length"], condition, unconditional, first
        )
    )  # fmt: skip
    steps, atols = expected["steps"], call["result_stats"]["steps"]
    for z, step, atol in zip(seen, steps, atols, strict=True):
        if "z" not in step:  # not kept of every case
            continue
        torch.testing.assert_close(z, step["z"][: len(z)], rtol=0, atol=atol["z"]["suggested_atol"])
        if len(z) < len(step["z"]):  # spatiotemporal guidance, whose third pass is the first one again
            torch.testing.assert_close(step["z"][4:], step["z"][:2], rtol=0, atol=1e-5)
    atol = call["result_stats"]["latents"]["suggested_atol"]
    torch.testing.assert_close(torch.stack(frames, dim=2), expected["latents"], rtol=0, atol=atol)
    assert next(draws.noises, None) is None
    assert next(draws.step_noises, None) is None


FORMS = sorted({name.split(".")[0] for name in load_nova("guidance")[0]} - {"growing", "spatiotemporal"})


@pytest.mark.parametrize("form", FORMS)
def test_predictions_of_passes_are_put_together_as_in_the_reference(form):
    calls, tensors = load_nova("guidance")
    call = calls[f"{form}.scale"]
    guidance = guidance_of(call["object"]["kwargs"])
    x = resolve(call["kwargs"], tensors)["x"]
    assert guidance.passes == {2: 1, 4: 2, 6: 3}[len(x)]
    expected, atol = resolve(call["result"], tensors), call["result_stats"]["suggested_atol"]
    torch.testing.assert_close(guidance.combined(x, guidance.scale), expected, rtol=0, atol=atol)
    if f"{form}.expand_text" in calls:
        call = calls[f"{form}.expand_text"]
        c = resolve(call["kwargs"], tensors)["c"]
        assert torch.equal(guidance.conditions(*c.chunk(2)), resolve(call["result"], tensors))
    call = calls[f"{form}.expand"]
    given = resolve(call["kwargs"], tensors)
    unseen = guidance.unseen(len(given["x"]), torch.device("cpu"))
    rows = given["x"].repeat(guidance.passes, 1, 1)
    rows = rows if unseen is None else torch.where(unseen[:, None, None], given["padding"], rows)
    assert torch.equal(rows, resolve(call["result"], tensors))


def test_guidance_grows_as_in_the_reference():
    calls, _ = load_nova("guidance")
    guidance = guidance_of(calls["growing"]["object"]["kwargs"])
    assert [guidance.scale_of(i, 8) for i in range(8)] == pytest.approx(calls["growing"]["result"])


def seeded(seeds: list[int], drawing: Drawing, kind: str = "ddpm") -> Tensor:
    network = golden_nova("transformer_t2v_small")
    condition = network.condition(torch.ones(len(seeds), 3, 20), torch.full((len(seeds),), 3))
    none = network.condition(torch.ones(len(seeds), 3, 20), torch.zeros(len(seeds)))
    draws = SeededDraws(SampleRandom(seeds))
    return torch.stack(list(draw_frames(network, process(kind), drawing, draws, 2, condition, none)), dim=2)


@torch.no_grad()
def test_a_seed_stands_for_a_drawing_in_any_batch():
    drawing = Drawing(groups=3, steps=2)
    both = seeded([1, 2], drawing)
    torch.testing.assert_close(seeded([2], drawing), both[1:], rtol=0, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)
    assert both.shape == (2, 4, 2, 8, 12)


@torch.no_grad()
def test_the_shift_of_a_flow_changes_a_drawing_and_one_that_is_the_process_s_own_does_not():
    drawing = Drawing(groups=2, steps=3)
    plain = seeded([1], drawing, "flow")
    torch.testing.assert_close(seeded([1], replace(drawing, flow_shift=1.0), "flow"), plain)
    assert not torch.allclose(seeded([1], replace(drawing, flow_shift=3.0), "flow"), plain, atol=1e-2)


def test_guidance_needs_what_stands_for_no_condition():
    with pytest.raises(ValueError, match="needs what stands for no condition"):
        TokenGuidance(3.0).conditions(torch.zeros(1, 2, 4), None)
    assert sum(group_sizes(24, 3)) == 24
