"""The semantic compressor and the previewer against the reference implementation's numbers."""

import pytest
import torch

from modules.effnet import EfficientNetEncoder, normalise_images
from modules.previewer import Previewer
from tests.golden import load_case, load_manifest, resolve, weights_of

CLASSES = {"EfficientNetEncoder": EfficientNetEncoder, "Previewer": Previewer}


@pytest.mark.parametrize("case", ["effnet_encoder", "previewer_small", "previewer_full_size"])
def test_golden_numbers(case):
    spec, tensors = load_case(case)
    model = CLASSES[spec["component"]](**spec["constructor"]).eval()
    model.load_state_dict(weights_of(spec, tensors), strict=True)
    for call in spec["calls"]:
        with torch.no_grad():
            mine = model(*resolve(call["args"], tensors))
        expected = resolve(call["result"], tensors)
        torch.testing.assert_close(mine, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize(("manifest", "parameters"), [("effnet_encoder", 20_197_968), ("previewer", 3_979_651)])
def test_full_size_networks_have_the_published_names_and_shapes(manifest, parameters):
    spec = load_manifest(manifest)
    with torch.device("meta"):
        model = CLASSES[spec["class"]](**spec["constructor"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        name: entry["shape"] for name, entry in spec["tensors"].items()
    }
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_compression_follows_the_strides_of_the_stages():
    small = [["fused", 1, 3, 2, 16, 16, 1], ["fused", 4, 3, 2, 16, 32, 1], ["mbconv", 4, 3, 2, 32, 48, 1]]
    encoder = EfficientNetEncoder(c_latent=4, stages=small).eval()
    assert encoder.compression == 16
    assert encoder(torch.rand(2, 3, 128, 96)).shape == (2, 4, 8, 6)
    with torch.device("meta"):
        assert EfficientNetEncoder().compression == 32


def test_a_wrong_stage_is_named():
    with pytest.raises(ValueError, match=r"'fussed'.*fused or mbconv"):
        EfficientNetEncoder(stages=[["fussed", 1, 3, 1, 8, 8, 1]])
    with pytest.raises(ValueError, match="multiples of 8"):
        EfficientNetEncoder(stages=[["mbconv", 1, 3, 1, 8, 12, 1]])
    with pytest.raises(ValueError, match=r"stage 2 takes 24 channels, .* gives 16"):
        EfficientNetEncoder(stages=[["fused", 1, 3, 1, 8, 16, 1], ["fused", 1, 3, 1, 24, 24, 1]])


def test_normalised_pictures_have_the_statistics_of_imagenet():
    picture = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(normalise_images(picture), torch.zeros(1, 3, 2, 2))
    assert normalise_images(picture + 0.229)[0, 0, 0, 0].item() == pytest.approx(1)
