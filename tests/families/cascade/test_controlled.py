"""Drawing under the control of ControlNets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from families.cascade.controlled import Control, ControlledStageC, condition_of_file, pasted
from families.cascade.diffusion import make_diffusion
from families.common.pictures import read_picture
from families.common.poses import PoseField, read_people
from families.common.sampling import draw_latents
from modules.filters.canny import CannyFilter
from modules.filters.inpaint import InpaintFilter
from modules.filters.pose import PoseFilter, draw_people
from modules.filters.super_resolution import SRFilter
from tests.modules.test_stage_c import golden_model, small_inputs
from warpcore.data.fields import BadMember
from warpcore.data.images import place
from warpcore.data.samples import Sample
from warpcore.errors import UserError

SHAPE, STEPS = (16, 6, 4), 8


@pytest.fixture(scope="module")
def generator():
    return golden_model("stage_c_small")[0]


def residuals(seed: int, batch: int = 1, size: tuple[int, int] = (6, 4)) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    return [None, torch.randn(batch, 64, *size, generator=g), None, torch.randn(batch, 64, *size, generator=g)]


def drawn(network, without: dict | None = None, **further) -> torch.Tensor:
    names = ("clip_text", "clip_text_pooled", "clip_img")
    given = {name: value for name, value in small_inputs().items() if name in names} | further
    nothing = {name: torch.zeros_like(given[name]) for name in names} | (further if without is None else without)
    return draw_latents(
        make_diffusion(), network, given, nothing, SHAPE, [1, 2], steps=STEPS, guidance=3.0, sampler="ddim"
    )


def controlled(generator, *controls: Control) -> torch.Tensor:
    return drawn(ControlledStageC(generator, controls, make_diffusion()), control=torch.ones(1))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_control_is_the_condition_of_stage_c(generator, batch):
    given = residuals(0, batch)
    expected = drawn(generator, cnet=[None if r is None else r.expand(2, -1, -1, -1) for r in given])
    torch.testing.assert_close(controlled(generator, Control(given)), expected)
    assert not torch.allclose(expected, drawn(generator))


@pytest.mark.bits
def test_no_strength_is_no_control_exactly(generator):
    assert torch.equal(controlled(generator, Control(residuals(0), strength=0)), drawn(generator))
    assert torch.equal(controlled(generator), drawn(generator))


def test_guidance_leads_towards_controls_that_the_other_side_lacks(generator):
    given, steered = residuals(0, 2), ControlledStageC(generator, [Control(residuals(0, 2))], make_diffusion())
    absent = [None if residual is None else torch.zeros_like(residual) for residual in given]
    expected = drawn(generator, {"cnet": absent}, cnet=given)
    found = drawn(steered, {"control": torch.zeros(1)}, control=torch.ones(1))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, drawn(generator, cnet=given))


def test_controls_add_up_by_their_strength(generator):
    one, other = residuals(0), residuals(1)[:2]
    both = [None, 0.5 * one[1] + 2 * other[1], None, 0.5 * one[3]]
    together = controlled(generator, Control(one, strength=0.5), Control(other, strength=2))
    torch.testing.assert_close(together, controlled(generator, Control(both)))


def test_controls_of_other_sizes_are_resized_to_the_first(generator):
    first, flat, large = (
        Control(residuals(0)),
        *(Control([None, torch.ones(1, 64, *size)]) for size in ((3, 2), (6, 4))),
    )
    expected = controlled(generator, first, large)
    torch.testing.assert_close(controlled(generator, first, flat), expected, rtol=0, atol=2e-3)
    assert (expected - controlled(generator, first)).abs().max() > 0.02


@pytest.mark.parametrize(("start", "end", "steps"), [(0, 1, range(8)), (0, 0.5, range(4)), (0.25, 0.75, range(2, 6))])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_control_counts_in_its_part_of_the_steps(generator, start, end, steps, shift):
    diffusion, seen = make_diffusion(), []
    network = ControlledStageC(generator, [Control(residuals(0), start=start, end=end)], diffusion, shift)
    watch = generator.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["cnet"][1].abs().sum().item() > 0), with_kwargs=True
    )
    conditions = {name: value for name, value in small_inputs().items() if name not in ("x", "r")}
    conditions["control"] = torch.ones(1)
    draw_latents(diffusion, network, conditions, None, SHAPE, [1, 2], steps=STEPS, guidance=None, shift=shift)
    watch.remove()
    assert [step for step, counts in enumerate(seen) if counts] == list(steps)


def test_a_part_that_is_none_is_refused():
    for start, end in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.5)):
        with pytest.raises(UserError, match="0 <= start < end <= 1"):
            Control([], start=start, end=end)


@pytest.fixture
def files(tmp_path):
    """A picture of a ramp, a mask of its right half, and a person."""
    ramp = np.linspace(0, 255, 80).astype(np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(np.uint8([[0] * 40 + [255] * 40] * 40)).save(tmp_path / "mask.png")
    person = [[10 * (i % 6), 10 * (i // 6), 1.0] for i in range(18)]
    pose = {"people": [{"pose_keypoints_2d": np.array(person).reshape(-1).tolist()}]}
    (tmp_path / "pose.json").write_text(json.dumps(pose))
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (40, 40)).save(tmp_path / "square.png")
    return tmp_path


def test_conditions_of_files(files):
    size = (40, 80)
    masked = condition_of_file(InpaintFilter(), files / "ramp.png", size, mask=files / "mask.png")
    assert masked.condition.shape == (1, 4, 40, 80)
    assert torch.equal(masked.condition[0, 3], (torch.arange(80) >= 40).float().expand(40, -1))
    assert (masked.condition[0, :3, :, 40:] == 1).all()
    around = condition_of_file(InpaintFilter(), files / "ramp.png", size, margins=0.5).condition
    hole = torch.ones(40, 80)
    hole[10:30, 20:60] = 0
    assert torch.equal(around[0, 3], hole)
    assert (around[0, :3, 10:30, 20:60].diff(dim=2) >= 0).all()
    right = condition_of_file(InpaintFilter(), files / "ramp.png", (40, 160), margins=[0.0, 0.0, 1.0, 0.0]).condition
    assert torch.equal(right[0, 3], (torch.arange(160) >= 80).float().expand(40, -1))
    assert torch.equal(right[0, :3, :, :80], read_picture(files / "ramp.png"))
    large = condition_of_file(SRFilter(0.5), files / "ramp.png", (80, 160)).condition[0]
    assert torch.equal(large, read_picture(files / "ramp.png").repeat_interleave(2, 1).repeat_interleave(2, 2))
    edges = condition_of_file(CannyFilter(resize=None), files / "mask.png", size).condition
    assert edges[0, 0].any(dim=0).nonzero().flatten().tolist() in ([39], [40])
    ready = condition_of_file(CannyFilter(), files / "mask.png", size, ready=True).condition
    assert torch.equal(ready[0, 0], (torch.arange(80) >= 40).float().expand(40, -1))
    people = condition_of_file(PoseFilter(), files / "pose.json", size)
    drawn_people = draw_people(read_people((files / "pose.json").read_bytes(), size), size)
    assert torch.equal(people.picture[0], torch.from_numpy(drawn_people).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    ("filter", "name", "further", "reason"),
    [
        (InpaintFilter(), "ramp.png", {}, r"give one of the two"),
        (CannyFilter(), "ramp.png", {"margins": 0.5}, "neither a mask nor margins"),
        (InpaintFilter(), "ramp.png", {"margins": [0, 0, -1, 0]}, "as shares of its sides"),
        (InpaintFilter(), "ramp.png", {"mask": "pose.json"}, "is no mask for .*it is no picture"),
        (InpaintFilter(), "ramp.png", {"mask": "square.png"}, "40 x 40 px is not the shape of its picture, 80 x 40"),
        (InpaintFilter(), "ramp.png", {"ready": True}, "4 channels"),
        (CannyFilter(), "text.png", {}, r"text\.png cannot be read as a picture"),
        (InpaintFilter(), "ramp.png", {"margins": 0.5, "size": (16, 16)}, r"ramp\.png: .* 16 x 16 px: .* 32 px"),
    ],
)
def test_files_that_a_filter_cannot_use_are_named(files, filter, name, further, reason):
    given = {"size": (40, 80)} | {key: files / value if key == "mask" else value for key, value in further.items()}
    with pytest.raises(UserError, match=reason):
        condition_of_file(filter, files / name, **given)


def test_a_pasted_picture_is_the_drawing_in_the_hole_and_fades_to_the_picture_around_it():
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    inpainted = torch.cat([torch.rand(3, 128, 128), mask])
    whole = pasted(torch.full((3, 128, 128), 0.5), inpainted)
    assert (whole[:, 32:96, 32:96] == 0.5).all()
    seam = torch.zeros(128, 128, dtype=torch.bool)
    seam[30:98, 30:98] = True
    assert torch.equal(whole[:, ~seam], inpainted[:3, ~seam])
    assert pasted(torch.full((3, 64, 64), 0.5), inpainted).shape == (3, 128, 128)


def test_people_are_drawn_with_the_crop_of_their_picture():
    points = np.concatenate([np.random.default_rng(0).uniform(0, 1, (18, 2)) * (200, 100), np.ones((18, 1))], axis=1)
    sample = Sample("x.tar", "a", {}, 200, 100, seed=3)
    for canvas in ({}, {"canvas_width": 400, "canvas_height": 200}):
        scale = 2 if canvas else 1
        flat = (points * (scale, scale, 1)).reshape(-1).tolist()
        data = json.dumps({"people": [{"pose_keypoints_2d": flat}], **canvas}).encode()
        geometry = place((100, 200), (50, 60), "random", seed=3)
        found = PoseField(("pose.json",)).decode(data, geometry, sample)
        shifted = points * (0.5, 0.5, 1) - (geometry.left, geometry.top, 0)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), draw_people([shifted], (50, 60)))
    for broken in (b"[1, 2]", b"{", b'{"people": [{}]}', b'{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}'):
        with pytest.raises(BadMember):
            PoseField(("pose.json",)).decode(broken, geometry, sample)
