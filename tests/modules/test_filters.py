"""The filters of a ControlNet against the reference implementation's numbers, and as workers use them."""

import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from modules.effnet import EfficientNetEncoder
from modules.filters import FILTERS, faces, identity, inpaint, pidi
from modules.filters.canny import CannyFilter
from modules.filters.faces import find_faces
from modules.filters.identity import IdentityFilter
from modules.filters.inpaint import InpaintFilter
from modules.filters.member import DepthFilter
from modules.filters.pidi import PidiFilter
from modules.filters.pidinet import PiDiNet
from modules.filters.pose import as_18_points, draw_people
from modules.filters.qr import QRFilter
from modules.filters.saliency import Saliency
from modules.filters.super_resolution import SREffnetFilter, SRFilter
from tests.golden import load_case, resolve, weights_of

CALLS = {call["name"]: call for call in load_case("controlnet_filters")[0]["calls"]}


@pytest.mark.parametrize("name", CALLS)
def test_golden_numbers(name):
    call, tensors = CALLS[name], load_case("controlnet_filters")[1]
    made = FILTERS[call["object"]["class"]](**call["object"].get("kwargs", {}))
    (pictures,) = resolve(call["args"], tensors)
    mask = resolve(call.get("kwargs", {}), tensors).get("mask")
    mine = made(pictures) if mask is None else made.masked(pictures, mask)
    expected = resolve(call["result"], tensors)
    torch.testing.assert_close(mine.condition, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])
    assert mine.condition.shape[1] == made.channels
    assert mine.picture.shape == pictures.shape


def test_golden_latents_of_smaller_pictures():
    spec, tensors = load_case("controlnet_filter_super_resolution_effnet")
    encoder_spec, encoder_tensors = load_case("effnet_encoder")
    encoder = EfficientNetEncoder(**encoder_spec["constructor"]).eval()
    encoder.load_state_dict(weights_of(encoder_spec, encoder_tensors))
    with torch.no_grad():
        mine = SREffnetFilter(spec["scale_factor"]).to("cpu", encoder)(tensors["in.picture"])
    torch.testing.assert_close(mine.condition, tensors["out.embedding"], rtol=0, atol=spec["suggested_atol"])
    torch.testing.assert_close(mine.picture[..., ::4, ::4], tensors["out.preview"], rtol=0, atol=1e-6)


@pytest.fixture
def pictures():
    """Two pictures of smooth blobs, uint8 (2, 3, 72, 96)."""
    coarse = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (72, 96), mode="bicubic").clamp(0, 1).mul(255).byte()


@pytest.fixture
def files(tmp_path):
    """Weights files of the networks that filters use, with random weights."""
    for name, network in {"saliency_model.pt": Saliency(), "table5_pidinet.pth": PiDiNet()}.items():
        torch.save(random_weights(network, 0), tmp_path / name)
    return tmp_path


def random_weights(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), network.state_dict()
    return {
        name: torch.randn(tensors[name].shape, generator=generator) / max(1, tensors[name][0].numel()) ** 0.5
        for name in sorted(tensors)
    }


@pytest.mark.bits
@pytest.mark.parametrize("name", ["inpaint", "inpaint by saliency", "qr", "pidi"])
def test_chance_belongs_to_the_picture(name, pictures, files):
    made = {
        "inpaint": lambda: InpaintFilter(),
        "inpaint by saliency": lambda: InpaintFilter((0.3, 0.7), saliency_checkpoint_path=files / "saliency_model.pt"),
        "qr": lambda: QRFilter(resize=None, blur_kernels=[0, 15]),
        "pidi": lambda: PidiFilter(files / "table5_pidinet.pth", resize=64),
    }[name]()
    seeds = [2**62 + 5, 7]
    together = made(pictures, seeds).condition
    alone = made(pictures[1:], seeds[1:]).condition
    # In a batch of another size a network may round otherwise, and what is above a threshold may change.
    assert ((together[1:] - alone).abs() > 1e-4).float().mean() < 0.01
    assert torch.equal(pickle.loads(pickle.dumps(made))(pictures, seeds).condition, together)
    others = [made(pictures[:1].float() / 255, [seed]).condition for seed in range(6)]
    assert any(not torch.equal(other, others[0]) for other in others)
    assert together.shape == (2, made.channels, 72, 96)
    assert 0 <= together.min() < together.max() <= 1


def test_random_masks_hide_a_part(pictures):
    many = pictures[:1].expand(200, -1, -1, -1)
    condition, shown = InpaintFilter(p_outpaint=0.4)(many, range(200))
    mask = condition[:, 3:]
    assert set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(condition[:, :3], torch.where(mask > 0, 1.0, many / 255))
    assert torch.equal(shown, condition[:, :3])
    hidden = mask.mean(dim=(1, 2, 3))
    assert 0.3 < hidden.mean() < 0.6
    assert ((hidden > 0.02) & (hidden < 0.98)).float().mean() > 0.95
    outside = InpaintFilter(p_outpaint=1)(many, range(200)).condition[:, 3:]
    corners = outside[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.mean() > 0.8) & (outside.mean() > 0.5)
    brushed = InpaintFilter(p_outpaint=0)(many, range(200)).condition[:, 3:]
    assert brushed.mean() < outside.mean()


def test_a_saliency_mask_hides_what_catches_the_eye_or_all_else(pictures, files):
    path = files / "saliency_model.pt"
    large = torch.nn.functional.interpolate(pictures / 255, (240, 320), mode="bilinear", antialias=True)
    middle = InpaintFilter(saliency_checkpoint_path=path).saliency(large).median().item()
    one, other = (InpaintFilter((middle, middle), p, path)(pictures) for p in (0, 1))
    mask, inverse = one.condition[:, 3:], other.condition[:, 3:]
    assert 0.3 < mask.mean() < 0.7
    assert ((mask + inverse) == 1).float().mean() > 0.97, "all but the blurred outline"
    every = InpaintFilter((0.0, 0.0), 0, path)(pictures)
    assert every.condition[:, 3:].min() == 1


def test_small_networks_compute_the_published_numbers():
    """Numbers of the reference implementation's saliency network, and of controlnet_aux's PiDiNet (version 0.0.10)."""
    generator = torch.Generator().manual_seed(0)
    network, shapes = Saliency().eval(), {name: tensor.shape for name, tensor in Saliency().named_parameters()}
    network.load_state_dict({name: torch.randn(shapes[name], generator=generator) * 0.3 for name in sorted(shapes)})
    with torch.no_grad():
        found = network(torch.rand(1, 3, 240, 320, generator=generator))
    assert found.shape == (1, 1, 30, 40)
    expected = [0.9982442855834961, 0.9992499947547913, 0.9999805688858032, 0.986456036567688]
    torch.testing.assert_close(found[0, 0, 3, [2, 9, 17, 30]], torch.tensor(expected), rtol=0, atol=1e-5)

    generator = torch.Generator().manual_seed(0)
    network, shapes = PiDiNet().eval(), {name: tensor.shape for name, tensor in PiDiNet().named_parameters()}
    network.load_state_dict(
        {n: torch.randn(shapes[n], generator=generator) / max(1, shapes[n][1:].numel()) ** 0.5 for n in sorted(shapes)}
    )
    with torch.no_grad():
        found = network(torch.rand(1, 3, 40, 56, generator=generator))
    expected = [0.4153156280517578, 0.5575464963912964, 0.4705040752887726, 0.32286712527275085]
    torch.testing.assert_close(found[0, 0, 17, [0, 13, 28, 55]], torch.tensor(expected), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) == 710_149


def test_light_and_dark():
    ramp = torch.linspace(0, 255, 90).byte().expand(1, 3, 60, 90)
    levels = QRFilter(resize=None, blobify=False)(ramp).condition[0, 0, 30]
    assert levels.tolist() == [0.0] * 30 + [0.5] * 30 + [1.0] * 30


def test_depth_is_the_brightness_of_its_picture():
    grey = torch.randint(0, 256, (2, 1, 9, 7), dtype=torch.uint8)
    torch.testing.assert_close(DepthFilter()(grey.expand(-1, 3, -1, -1)).condition, grey / 255)


@pytest.mark.parametrize("order", [17, 25])
def test_people_of_every_model_are_drawn_alike(order):
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(5, 60, (18, 2)), np.ones((18, 1))], axis=1)
    points[1, :2] = (points[2, :2] + points[5, :2]) / 2  # COCO has no neck
    names = ["nose", "neck", "r sho", "r elb", "r wri", "l sho", "l elb", "l wri", "r hip", "r kne", "r ank", "l hip",
             "l kne", "l ank", "r eye", "l eye", "r ear", "l ear"]  # fmt: skip
    body_25 = [*names[:8], "mid hip", *names[8:], *(f"foot {i}" for i in range(6))]
    coco_17 = ["nose", "l eye", "r eye", "l ear", "r ear", "l sho", "r sho", "l elb", "r elb", "l wri", "r wri",
               "l hip", "r hip", "l kne", "r kne", "l ank", "r ank"]  # fmt: skip
    by_name = dict(zip(names, points, strict=True))
    theirs = np.stack([by_name.get(name, np.zeros(3)) for name in {17: coco_17, 25: body_25}[order]])
    drawn = draw_people([as_18_points(theirs)], (64, 64))
    assert np.array_equal(drawn, draw_people([points], (64, 64)))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > len(names)
    points[:, 2] = 0
    assert not draw_people([points], (64, 64)).any()


FACE = np.array([[40, 50], [60, 50], [50, 60], [42, 70], [58, 72]], float)


@pytest.fixture
def recognised(monkeypatch, tmp_path):
    """Faces with the points `FACE` and twice as large, 100 px further right, found by pretended models."""

    def run(path, picture):
        if path.name == "w600k_r50.onnx":
            seen.append(picture)
            return [np.full((1, 512), picture.mean() + 2)]
        outputs = [np.zeros((2 * (320 // stride) ** 2, width)) for width in (1, 4, 10) for stride in (8, 16, 32)]
        # Both anchors of one position see the first face, another stride the second one.
        for anchor in (0, 1):
            put(outputs, 0, 8, (6, 7), anchor, np.array([35, 45, 65, 80]), FACE)
        put(outputs, 1, 16, (7, 11), 0, np.array([170, 90, 230, 160]), FACE * 2 + (100, 0))
        return outputs

    def put(outputs, level, stride, place, anchor, box, points):
        row = 2 * (place[0] * (320 // stride) + place[1]) + anchor
        middle = np.array(place[::-1]) * stride
        outputs[level][row] = 0.9 - 0.1 * anchor
        outputs[level + 3][row] = np.concatenate([middle - box[:2], box[2:] - middle]) / stride
        outputs[level + 6][row] = ((points - middle) / stride).reshape(-1)

    seen: list[np.ndarray] = []
    monkeypatch.setattr(faces, "_run", run)
    monkeypatch.setattr(identity, "check_files", lambda folder: None)
    return seen


def test_faces_are_found_turned_upright_and_put_on_the_map(recognised, monkeypatch):
    picture = torch.zeros(1, 3, 320, 320, dtype=torch.uint8)
    for x, y in FACE.astype(int):
        picture[0, :, y - 1 : y + 2, x - 1 : x + 2] = 255
    condition, shown = IdentityFilter(p_drop=0, p_full=0)(picture)
    assert condition.shape == (1, 512, 10, 10)
    covered = condition[0].norm(dim=0)
    assert torch.equal(covered.nonzero(), torch.tensor([[y, x] for y, x in np.ndindex(10, 10) if boxed(y, x)]))
    torch.testing.assert_close(covered[covered > 0], torch.ones(int((covered > 0).sum())))
    assert shown[0, :, 32:64, 32:64].mean() > shown[0, :, 64:96, :32].mean() == 0
    aligned = max(recognised, key=lambda face: face.max())  # the one with the marks
    for x, y in faces.FACE_POINTS_PX:
        assert aligned[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].max() > 0.9
    assert IdentityFilter(p_drop=1, p_full=0)(picture).condition.abs().sum() == 0
    assert len(find_faces(picture[0].permute(1, 2, 0).numpy(), identity.Path("."), most=1).boxes) == 1
    monkeypatch.setattr(faces, "LEAST_SCORE", 1.0)
    assert IdentityFilter()(picture).condition.abs().sum() == 0


def boxed(y: int, x: int) -> bool:
    """The cells of 32 px that the boxes (35, 45, 65, 80) and (170, 90, 230, 160) round to."""
    return (y == 1 and x == 1) or (3 <= y < 5 and 5 <= x < 7)


def test_what_a_filter_cannot_do_is_said(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"CannyFilter can't use pictures of 96 x 2 px: it needs at least 3 px"):
        CannyFilter()(pictures[:, :, :2])
    with pytest.raises(ValueError, match=r"takes pictures \(B, 3, H, W\), not \(3, 72, 96\)"):
        CannyFilter()(pictures[0])
    with pytest.raises(ValueError, match=r"det_10g\.onnx.*onnxruntime.*buffalo_l\.zip"):
        IdentityFilter(models_path=tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.pth does not exist\. .*lllyasviel/Annotators"):
        PidiFilter(tmp_path / "nowhere.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt was made for another network: Missing key"):
        InpaintFilter(saliency_checkpoint_path=tmp_path / "other.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read"):
        InpaintFilter(saliency_checkpoint_path=tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"scale_factor 2 .*\(0, 1\)"):
        SRFilter(2)
    with pytest.raises(ValueError, match="odd sizes"):
        QRFilter(dilation_kernels=[4])
    with pytest.raises(ValueError, match="call `to`"):
        SREffnetFilter()(pictures)
    with pytest.raises(ValueError, match=r"19 key points; 17 \(COCO\), 18 or 25"):
        as_18_points(np.zeros((19, 3)))


@pytest.mark.integration
def test_workers_import_little_for_a_filter():
    code = (
        "import sys, modules.filters; "
        "print(*(set(sys.modules) & {'torchvision', 'kornia', 'onnxruntime', 'pydantic', 'open_clip'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_masks_are_blurred_and_edges_thickened_as_by_opencv(pictures):
    mask = (pictures[:1, :1].float() / 255 > 0.5).float()
    blurred = cv2.GaussianBlur(mask[0, 0].numpy(), (25, 25), 4.0, borderType=cv2.BORDER_REFLECT_101)
    torch.testing.assert_close(inpaint._blurred(mask, 4.0)[0, 0], torch.from_numpy(blurred), rtol=0, atol=1e-5)
    edge = pictures[0, :1].float() / 255
    for size in (0, 3, 7):
        brush = pidi.disc(size).astype(np.uint8) if size else np.ones((1, 1), np.uint8)
        thick = torch.from_numpy(cv2.dilate(edge[0].numpy(), brush))
        torch.testing.assert_close(pidi._dilated(edge, size)[0], thick, rtol=0, atol=0)
