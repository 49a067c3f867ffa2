"""What a config can say of a ControlNet, and its files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from families.cascade.config import ModelSettings
from families.cascade.controlnet import (
    ControlNetSettings,
    check_side,
    file_metadata,
    load_controlnet,
    make_controlnet,
    make_filter,
    published_layout,
    settings_of_file,
)
from families.common.weights import WeightsError
from modules.filters import Filter, Filtered
from modules.filters.canny import CannyFilter
from tests.golden import load_manifest
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.weights import write_weights

MINI = ModelSettings(model_version="mini")
MINI_WIDTHS = [128] * 6


class Negative(Filter):
    """A filter of a user's own."""

    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def apply(self, images: Tensor, seeds) -> Filtered:
        return Filtered(1 - images * self.strength, images)


def settings(name: str = "CannyFilter", params: dict | None = None, **changes) -> ControlNetSettings:
    changes = {"controlnet_blocks": [0, 3]} | changes
    return ControlNetSettings(controlnet_filter=name, controlnet_filter_params=params, **changes)


def test_filters_take_the_parameters_of_the_public_configs():
    assert make_filter(settings("CannyFilter", {"resize": 224})).resize == 224
    assert make_filter(settings("CannyFilter", {"resize": None})).resize is None
    inpaint = make_filter(settings("InpaintFilter", {"thresold": [0.04, 0.4], "p_outpaint": 0.4}))
    assert (inpaint.thresold, inpaint.p_outpaint, inpaint.channels) == ((0.04, 0.4), 0.4, 4)
    assert make_filter(settings("SREffnetFilter", {"scale_factor": 0.5})).on_device
    assert make_filter(settings("DepthFilter", {"member": "d.png"})).member == "d.png"


def test_a_filter_of_ones_own_is_named_by_where_it_is():
    made = make_filter(settings(f"{__name__}.Negative", {"strength": 0.5}))
    assert isinstance(made, Negative)
    assert made(torch.ones(1, 3, 4, 4)).condition.mean() == 0.5


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("CanyFilter", None, r"no 'CanyFilter'; write one of CannyFilter, DepthFilter, .*my_package"),
        ("nowhere.Filter", None, r"nowhere\.Filter cannot be imported: No module named 'nowhere'"),
        (f"{__name__}.Positive", None, "Positive cannot be imported: .*has no attribute 'Positive'"),
        (f"{__name__}.settings", None, r"does not subclass modules\.filters\.Filter; there are CannyFilter"),
        ("CannyFilter", {"resise": 3}, r"of CannyFilter: .*resise: unknown key; did you mean resize\?"),
        ("CannyFilter", {"resize": "big"}, r"resize: found 'big', but .*valid integer"),
        ("CannyFilter", {"low": True}, r"low: .*a number is needed, not true or false"),
        ("InpaintFilter", {"thresold": [0.1]}, r"thresold"),
        ("SRFilter", {"scale_factor": 4}, r"of SRFilter: scale_factor 4.* does not make pictures smaller"),
        ("PidiFilter", {"checkpoint_path": "x.pth"}, r"of PidiFilter: x\.pth does not exist"),
    ],
)
def test_wrong_filters_and_parameters_are_named(name, params, reason):
    with pytest.raises(UserError, match=f"(?s){reason}"):
        make_filter(settings(name, params))


def test_blocks_that_the_generator_does_not_have_are_named():
    for blocks, reason in {
        (0, 6, 9): r"no block 6, 9; Stage C \(mini\) has 6 convolution blocks, 0 to 5",
        (): "at least one",
        (1, 1): "different blocks",
    }.items():
        with pytest.raises(UserError, match=reason):
            make_controlnet(settings(controlnet_blocks=list(blocks)), MINI, CannyFilter(), MINI_WIDTHS)
    with pytest.raises(UserError, match="all of one width"):
        make_controlnet(settings(), MINI, CannyFilter(), [64, 64, 64, 128, 128, 128])


def test_pictures_too_small_for_the_filter_are_refused_before_training():
    check_side(make_filter(settings("InpaintFilter")), [(32, 96), (64, 64)])
    with pytest.raises(
        UserError, match=r"InpaintFilter needs pictures of 32 px or more, but some would have 96 x 16 px"
    ):
        check_side(make_filter(settings("InpaintFilter")), [(64, 64), (16, 96)])


@pytest.mark.bits
def test_a_file_says_how_its_controlnet_was_made(tmp_path):
    made = settings("QRFilter", {"resize": 64, "blobify": False}, controlnet_blocks=[5, 2])
    network = make_controlnet(made, MINI, make_filter(made), MINI_WIDTHS)
    torch.nn.init.normal_(network.projections[0][-1].weight)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "c.safetensors", file_metadata(made))
    loaded, made_again = load_controlnet(tmp_path / "c.safetensors", MINI)
    assert (type(made_again).__name__, made_again.resize, loaded.proj_blocks) == ("QRFilter", 64, (5, 2))
    condition = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(condition)[5], network(condition)[5])
    with pytest.raises(WeightsError, match=r"c\.safetensors was made for another network: .*Check the file"):
        load_controlnet(tmp_path / "c.safetensors", ModelSettings(model_version="3.6B"))
    with pytest.raises(UserError, match=r"reference implementation controls Stage C 3\.6B only"):
        published_layout(tmp_path / "c.safetensors")


def test_no_code_is_imported_that_only_a_file_names(tmp_path):
    (tmp_path / "hostile.py").write_text("raise AssertionError('it has run')", encoding="utf-8")
    made = settings(f"{__name__}.Negative")
    state = make_controlnet(made, MINI, make_filter(made), MINI_WIDTHS).state_dict()
    for name in ("hostile.Filter", f"{__name__}.Negative", "os.system"):
        about = file_metadata(settings(name))
        write_weights(tmp_path / "c.safetensors", state, about)
        with pytest.raises(WeightsError, match=rf"its filter is '{name}'.*is not run.*controlnet_filter: {name}"):
            load_controlnet(tmp_path / "c.safetensors", MINI)
    said = {"controlnet_filter": f"{__name__}.Negative"}
    assert isinstance(load_controlnet(tmp_path / "c.safetensors", MINI, said)[1], Negative)


@pytest.mark.parametrize(
    "about", ["", "[]", "{", "[" * 100_000, '{"controlnet_blocks": "x"}', '{"other": 1}', "1" * 5000]
)
def test_metadata_that_is_no_controlnets_is_named(tmp_path, about):
    write_weights(tmp_path / "c.safetensors", {"weight": torch.zeros(1)}, {"controlnet": about})
    with pytest.raises(UserError, match=r"controlnet: .*c\.safetensors"):
        settings_of_file(tmp_path / "c.safetensors")


PUBLISHED = {
    "canny": ("CannyFilter", "effnet", 8),
    "inpainting": ("InpaintFilter", "effnet", 8),
    "identity": ("IdentityFilter", "simple", 64),
    "super_resolution": ("SREffnetFilter", "large", 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_known_by_their_shapes_and_go_back_to_their_layout(name, tmp_path, monkeypatch):
    manifest = load_manifest(f"controlnet_{name}")
    # The shapes, without the memory.
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in manifest["tensors"].items()}
    monkeypatch.setattr("families.cascade.controlnet.read_weights", lambda path, key: state)
    found = settings_of_file(tmp_path / f"{name}.pt")
    kind, mode, blocks = PUBLISHED[name]
    assert (found.controlnet_filter, found.controlnet_bottleneck_mode) == (kind, mode)
    assert found.controlnet_blocks == manifest["constructor"]["proj_blocks"]
    assert (len(found.controlnet_blocks), found.official_stem) == (blocks, True)
    assert published_layout(tmp_path / f"{name}.pt") == (state, [])


def test_a_padded_stem_is_mentioned_in_the_published_layout(tmp_path, monkeypatch):
    manifest = load_manifest("controlnet_canny")
    shapes = {key: torch.empty(entry["shape"], device="meta") for key, entry in manifest["tensors"].items()}
    monkeypatch.setattr("families.cascade.controlnet.read_weights", lambda path, key: shapes)
    monkeypatch.setattr("families.cascade.controlnet.settings_of_file", lambda path: settings())
    _, notes = published_layout(tmp_path / "ours.safetensors")
    assert "shifted by one pixel" in notes[0]


def test_what_a_file_does_not_say_is_given(tmp_path):
    made = settings("QRFilter", controlnet_blocks=[5, 2, 1])
    state = make_controlnet(made, MINI, make_filter(made), MINI_WIDTHS).state_dict()
    write_weights(tmp_path / "unsaid.safetensors", state)
    with pytest.raises(WeightsError, match=r"\(1 channels, 3 blocks\): give controlnet_blocks as in its training"):
        settings_of_file(tmp_path / "unsaid.safetensors")
    said = {"controlnet_filter": "QRFilter", "controlnet_blocks": [5, 2, 1]}
    found = settings_of_file(tmp_path / "unsaid.safetensors", said)
    assert found == made.model_copy(update={"controlnet_bottleneck_mode": "effnet", "official_stem": True})
    write_weights(tmp_path / "said.safetensors", state, file_metadata(made))
    assert settings_of_file(tmp_path / "said.safetensors", {"controlnet_blocks": [0]}).controlnet_blocks == [0]


def test_other_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors holds no ControlNet: its tensors have other names"):
        settings_of_file(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        settings_of_file(tmp_path / "nowhere.safetensors")


def test_settings_survive_their_file():
    made = settings("InpaintFilter", {"thresold": [0.1, 0.2]}, official_stem=True)
    assert make_config(ControlNetSettings, json.loads(file_metadata(made)["controlnet"])) == made
