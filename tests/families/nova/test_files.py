"""Published folders of NOVA are read strictly: its transformer, and the autoencoder of its clips."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families.common.autoencoders import Autoencoder
from families.nova import build
from families.nova.autoencoder import NovaClips
from families.nova.inference import NovaInferenceSettings
from families.nova.versions import VERSIONS
from modules.open_sora_plan_vae import is_open_sora_plan
from tests.golden import load_case, resolve, weights_of
from tests.small_nova import golden_nova
from warpcore.config import make_config
from warpcore.errors import UserError

VIDEOS, KEY = "transformer_t2v_small", "generator_checkpoint_path"


def published(folder: Path, case: str = VIDEOS, pickled: bool = False, **changes) -> Path:
    """A pipeline's folder, of which the network is one part. A change of None leaves a number out."""
    part = folder / "transformer"
    part.mkdir(parents=True)
    numbers = load_case(f"nova/{case}")[0]["constructor"] | {"_class_name": "NOVATransformer3DModel"} | changes
    numbers = {name: value for name, value in numbers.items() if value is not None}
    (part / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    state = golden_nova(case).state_dict()
    if pickled:
        torch.save(state, part / "diffusion_pytorch_model.bin")
    else:
        save_file(state, part / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def read(monkeypatch):
    """Reads the network of a folder, of a version that its config says."""

    def network(folder: Path) -> dict[str, torch.Tensor]:
        part = folder if folder.name == "transformer" else folder / "transformer"
        numbers = json.loads((part / "config.json").read_text(encoding="utf-8"))
        monkeypatch.setitem(VERSIONS, "mini", replace(VERSIONS["mini"], network=numbers))
        settings = make_config(NovaInferenceSettings, {KEY: str(folder)})
        return build.network(settings, settings.trained_px).state_dict()

    return network


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("case", [VIDEOS, "transformer_rope_small", "transformer_t2i_small"])
def test_a_published_folder_is_the_network_that_its_config_says(tmp_path, read, case, pickled):
    folder, expected = published(tmp_path, case, pickled), golden_nova(case).state_dict()
    for path in (folder, folder / "transformer"):
        found = read(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_mixer_rank": None}, "have a mixer of rank 3: write video_mixer_rank: 3"),
        ({"video_mixer_rank": -1}, "have a mixer of rank 3: write"),
        ({"video_mixer_rank": 5}, "have a mixer of rank 3: write"),
        ({"video_base_size": [1, 2, 3]}, "motion_embed.flow_proj.0.bias is only in the file"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, read, changes, message):
    with pytest.raises(UserError, match=message):
        read(published(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_mixer_rank": 3}, "have no mixer of frames: write video_mixer_rank: 0"),
        ({"text_token_dim": None}, "label_embed.weight is missing in the file"),
    ],
)
def test_a_config_of_other_pictures_is_refused(tmp_path, read, changes, message):
    with pytest.raises(UserError, match=message):
        read(published(tmp_path, "transformer_t2i_small", **changes))


SPEC, TENSORS = load_case("nova/vae_opensora_small")
CALLS = {call["name"]: call for call in SPEC["calls"]}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> NovaClips:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "vae").mkdir()
    numbers = SPEC["constructor"] | {"_class_name": "AutoencoderKLOpenSora"}
    (folder / "vae" / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    save_file(weights_of(SPEC, TENSORS), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return NovaClips.read(folder)


def test_clips_pass_the_autoencoder_as_in_the_reference(autoencoder):
    call = CALLS["decode_2x2x3"]
    latents = autoencoder.scale.apply(resolve(call["args"], TENSORS)[0])
    clips = autoencoder.decoded_clips(latents)
    expected = (resolve(call["result"], TENSORS).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(clips, expected, rtol=0, atol=1e-4)
    pixels = (clips * 255).round().to(torch.uint8)
    moments = autoencoder.clip_moments(pixels)
    assert moments.shape == (1, 8, autoencoder.latent_frames(5), 2, 3)
    assert autoencoder.frames_of(moments.shape[2]) == 5
    expected = autoencoder.model.encode(pixels.transpose(1, 2) / 127.5 - 1)
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="clips of 6 frames: write one more than a multiple of 4, such as 5 or 9"):
        autoencoder.clip_moments(torch.zeros(1, 6, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match="a clip of 20 x 16 px; sides have to be multiples of 8"):
        autoencoder.clip_moments(torch.zeros(1, 1, 3, 16, 20, dtype=torch.uint8))


@torch.no_grad()
def test_the_autoencoder_of_pictures_is_the_library_s():
    spec, tensors = load_case("nova/vae_kl_small")
    weights = weights_of(spec, tensors)
    autoencoder = Autoencoder.of(spec["constructor"], lambda: weights, Path("pictures"))
    calls = {call["name"]: call for call in spec["calls"]}

    def agrees(found: torch.Tensor, name: str) -> None:
        expected, atol = resolve(calls[name]["result"], tensors), calls[name]["result_stats"]["suggested_atol"]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)

    given = {name: resolve(call["args"], tensors)[0] for name, call in calls.items()}
    posterior = autoencoder.model.encode(given["encode"]).latent_dist
    agrees(torch.cat([posterior.mean, posterior.logvar], dim=1), "encode")
    agrees(autoencoder.model.decode(given["decode"]).sample, "decode")
    agrees(autoencoder.scale.apply(given["scale"]), "scale")
    agrees(autoencoder.scale.undo(given["unscale"]), "unscale")


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"encoder.mid.block_1.conv1.conv.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    assert is_open_sora_plan(["encoder.mid.block_1.conv1.conv.weight"])
    with pytest.raises(UserError, match="was made for another network"):
        NovaClips.read(tmp_path / "vae.safetensors")
