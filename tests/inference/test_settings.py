"""Keys of drawing whose wrong value would only be seen in the pictures: networks, sizes, precision."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.cascade import build
from families.cascade.inference import DrawingSettings
from families.cascade.reconstruction import CascadeReconstructConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from families.common.autoencoders import Autoencoder
from families.common.lora_config import LoraKeys
from families.stable_diffusion import build as sd_build
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.drawing import StableDiffusionNetworks
from families.stable_diffusion.text_to_image import SdTextToImageConfig, StableDiffusionTextToImage
from inference.reconstruct import main as reconstruct
from tests.families.stable_diffusion.tiny_pipeline import write_sd15
from warpcore.config import make_config


@pytest.mark.parametrize(("ratio", "sd", "cascade"), [
    (1, (512, 512), (512, 512)), ("16:9", (384, 704), (384, 683)), ("2/3", (640, 448), (627, 418)),
    (1.5, (448, 640), (418, 627)),
])  # fmt: skip
def test_an_aspect_ratio_is_width_over_height_and_keeps_the_area(tmp_path, ratio, sd, cascade):
    given = {"prompts": ["x"], "image_size": 512, "aspect_ratio": ratio}
    unet = write_sd15(tmp_path)
    assert make_config(SdTextToImageConfig, given | {"generator_checkpoint_path": str(unet)}).size_px == sd
    save_file({"a": torch.zeros(1)}, tmp_path / "c.safetensors", {"family": "cascade"})
    given["generator_checkpoint_path"] = str(tmp_path / "c.safetensors")
    assert make_config(CascadeTextToImageConfig, given).size_px == cascade


def test_stage_b_has_its_own_size_and_shift(drawing_cascade):
    plain = make_config(DrawingSettings, drawing_cascade)
    assert plain.stage_b.model_version == "mini"
    assert plain.stage_b_sampling["shift"] == 1.0
    other = make_config(DrawingSettings, drawing_cascade | {"stage_b_version": "700M", "stage_b_shift": 2.5})
    assert (other.model_version, other.stage_b.model_version) == ("mini", "700M")
    assert other.stage_b_sampling["shift"] == 2.5


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("named", [False, True])
def test_weights_of_a_tower_take_the_place_of_those_that_its_name_has(drawing_cascade, tmp_path, tower, named):
    original = tmp_path / f"{tower}.safetensors"
    network = getattr(build, tower)(make_config(DrawingSettings, drawing_cascade))
    for parameter in network.parameters():
        parameter.data.zero_()
    network.save(tmp_path / "other.safetensors")
    given = {f"clip_{tower}_checkpoint_path": str(tmp_path / "other.safetensors")}
    given |= {f"clip_{tower}_model_name": str(original)} if named else {}
    settings = make_config(DrawingSettings, drawing_cascade | given)
    assert not any(parameter.any() for parameter in getattr(build, tower)(settings).parameters())
    assert build.network_file(settings, tower) == tmp_path / "other.safetensors"
    assert any(tensor.any() for tensor in load_file(original).values())


@pytest.mark.parametrize("version", ["mini", "sd15"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_text_encoders_have_the_precision_that_is_asked_for(tmp_path, version, precision):
    given = {"model_version": version, "text_encoder_precision": precision}
    given |= {"generator_checkpoint_path": str(write_sd15(tmp_path))} if version == "sd15" else {}
    encoders = sd_build.text_encoders(make_config(SdSettings, given))
    assert {parameter.dtype for parameter in encoders.parameters()} == {getattr(torch, precision)}


@pytest.mark.parametrize("tiled", [False, True])
def test_tiled_decoding_is_that_of_the_autoencoder(tmp_path, monkeypatch, tiled):
    config = make_config(SdTextToImageConfig, {
        "prompts": ["x"], "image_size": 64, "steps": 1, "device": "cpu", "tiled_decoding": tiled,
        "generator_checkpoint_path": str(write_sd15(tmp_path)),
    })  # fmt: skip
    seen, decode = [], Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: seen.append(self.tiling) or decode(self, z))
    monkeypatch.setattr(StableDiffusionNetworks, "draw", lambda *_, **__: [torch.zeros(4, 8, 8)])
    StableDiffusionTextToImage(config).draw(["x"], [0])
    assert seen == [tiled]


def test_at_most_so_many_pictures_are_rebuilt_in_the_order_of_their_names(drawing_cascade, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in "cab":
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / f"{name}.png")
    given = {"pictures": tmp_path / "photos", "output_path": tmp_path / "out", "stage_a_only": "true"}
    keys = [f"{key}={value}" for key, value in (given | {"model_version": "mini", "device": "cpu"}).items()]
    monkeypatch.setattr("sys.argv", ["reconstruct.py", *keys, "most_pictures=2"])
    reconstruct()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000_a.png", "0001_b.png", "grid.png"]
    assert CascadeReconstructConfig.model_fields["most_pictures"].default == 64


@pytest.mark.parametrize(("keys", "alpha"), [({}, 8), ({"lora_init": "published"}, 1),
                                             ({"lora_init": "published", "alpha": 4.0}, 4)])  # fmt: skip
def test_the_start_of_adapters_says_their_alpha_where_no_key_does(keys, alpha):
    class Config(LoraKeys):
        pass

    settings = make_config(Config, {"module_filters": ["."], "rank": 8} | keys).lora_settings
    assert (settings.alpha, settings.init) == (alpha, keys.get("lora_init", "zero_up"))
