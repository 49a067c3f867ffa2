"""A published folder of what was trained: files and numbers as theirs, weights and diffusion as ours."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.common.family import TEXT_TO_IMAGE
from families.common.library_files import CONFIG_KEY
from families.common.weight_files import FAMILY_KEY, TARGET_KEY
from families.nova import build
from families.nova.config import NovaSettings
from families.nova.exports import published_config
from families.nova.inference import NovaInferenceSettings
from families.registry import family_of, load_task
from modules.nova import NOVATransformer
from tests.golden import load_manifest
from warpcore.config import make_config
from warpcore.diffusion.times import sampling_times
from warpcore.errors import UserError
from warpcore.meta import only_shapes

KEY = "generator_checkpoint_path"


def export(source: Path, target: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["export.py", "published", str(source), str(target), *arguments])
        importlib.import_module("tools.export").main()


def trained(file: Path, size_px: tuple[int, int] | None = None, **keys) -> dict[str, Tensor]:
    """A file as a run exports it."""
    settings = NovaSettings(**{"model_version": "mini"} | keys)
    numbers = build.network_numbers(settings, size_px)
    state = NOVATransformer(**numbers).state_dict()
    about = {FAMILY_KEY: "nova", CONFIG_KEY: json.dumps(numbers), TARGET_KEY: settings.target}
    save_file(state, file, about)
    return state


def settings_of(folder: Path, **keys) -> NovaInferenceSettings:
    return make_config(NovaInferenceSettings, {KEY: str(folder)} | keys)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


@pytest.mark.parametrize(
    "keys",
    [
        {"diffusion_target": "rectified_flows", "shift": 3.0},
        {"model_version": "mini-video", "diffusion_target": "epsilon", "video_mixer_rank": 3},
        {"rotary_pos_embed": True},
        {"num_classes": 7},
    ],
)
def test_a_folder_says_what_the_run_was_and_has_its_weights(keys, tmp_path):
    state = trained(tmp_path / "own.safetensors", (96, 160), **keys)
    export(tmp_path / "own.safetensors", tmp_path / "nova", f"shift={keys.get('shift', 1.0)}")
    assert family_of(tmp_path / "nova").name == "nova"
    for folder in (tmp_path / "nova", tmp_path / "nova" / "transformer"):
        settings = settings_of(folder)
        assert {key: getattr(settings, key) for key in keys} == keys
        assert settings.trained_px == (96, 160)
        assert equal(build.network(settings).state_dict(), state)
    export(tmp_path / "nova", tmp_path / "again", "export_dtype=bfloat16")
    for part in ("transformer/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "again" / part).read_text() == (tmp_path / "nova" / part).read_text()
    weights = load_file(tmp_path / "again" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert equal(weights, {name: tensor.bfloat16() for name, tensor in state.items()})


@pytest.mark.integration
@pytest.mark.slow
def test_the_folder_draws_what_the_run_draws(tmp_path):
    trained(tmp_path / "own.safetensors", (32, 64), diffusion_target="epsilon")
    export(tmp_path / "own.safetensors", tmp_path / "nova")
    drawn = []
    for place in ("own.safetensors", "nova"):
        given = [f"{KEY}={tmp_path / place}", "prompts=['a red box']", "groups=2", "steps=2", "device=cpu"]
        kind, config = load_task(TEXT_TO_IMAGE, given)
        drawn += kind(config).draw(["a red box"], [1]).pictures
    assert drawn[0].shape == (3, 32, 64)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)


def test_a_folder_of_other_classes_than_published_says_how_many(tmp_path, capsys):
    for classes, said, note in (
        (1000, None, ""),
        (7, 7, "The published program has 1000 classes, and this network 7"),
    ):
        trained(tmp_path / "own.safetensors", (32, 32), num_classes=classes)
        export(tmp_path / "own.safetensors", tmp_path / f"nova_{classes}")
        config = json.loads((tmp_path / f"nova_{classes}" / "transformer" / "config.json").read_text(encoding="utf-8"))
        assert "text_token_dim" not in config
        assert config.get("num_classes") == said
        assert note in capsys.readouterr().out
        assert settings_of(tmp_path / f"nova_{classes}").num_classes == classes


@pytest.mark.parametrize("case", ["d48w768_sdxl1024", "d48w1024_sd512", "d48w1024_osp480", "d48w1024_osp480_mixer24"])
def test_numbers_of_published_sizes_are_theirs(case):
    manifest = load_manifest(f"nova_{case}", "nova")
    version, _, mixer = case.partition("_mixer")
    settings = NovaSettings(model_version=version.replace("_", "-"), video_mixer_rank=int(mixer or 0))
    with only_shapes():
        found = json.loads(json.dumps(published_config(settings, settings.version.size_px)))
    assert found == {"_class_name": manifest["class"]} | manifest["constructor"]


class NOVATransformer3DModel(ModelMixin, NOVATransformer, ConfigMixin):
    """A network as the published program has it: of the library, which reads its folder."""

    @register_to_config
    def __init__(
        self, image_dim=None, image_size=None, image_stride=8, text_token_dim=None, text_token_len=None,
        image_base_size=None, video_base_size=None, video_mixer_rank=None, rotary_pos_embed=False, arch=("", "", ""),
    ):  # fmt: skip
        numbers = {name: value for name, value in locals().items() if name in self.config}
        NOVATransformer.__init__(self, **numbers)


def test_the_library_reads_the_folder(tmp_path):
    state = trained(tmp_path / "own.safetensors", model_version="mini-video", video_mixer_rank=3)
    export(tmp_path / "own.safetensors", tmp_path / "nova")
    folder = tmp_path / "nova" / "transformer"
    found, said = NOVATransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert equal(found.state_dict(), state)


def test_schedulers_of_the_library_noise_as_the_run_did(tmp_path):
    trained(tmp_path / "flow.safetensors")
    export(tmp_path / "flow.safetensors", tmp_path / "flow", "shift=3")
    sigmas = torch.arange(1000, 0, -1) / 1000
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "flow" / "scheduler")
    torch.testing.assert_close(theirs.sigmas, 3 * sigmas / (1 + 2 * sigmas))
    trained(tmp_path / "ddpm.safetensors", diffusion_target="epsilon")
    export(tmp_path / "ddpm.safetensors", tmp_path / "ddpm")
    theirs = DDPMScheduler.from_pretrained(tmp_path / "ddpm" / "scheduler")
    ours = build.process(settings_of(tmp_path / "ddpm")).schedule
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod.float(), rtol=1e-3, atol=1e-6)
    theirs.set_timesteps(25)
    assert [*theirs.timesteps.tolist(), -1] == sampling_times(ours, 25, "ddpm").tolist()  # and the clean end
    assert not theirs.config.clip_sample


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model_version=mini-video"], "is NOVA's mini; write model_version: mini"),
        (["video_mixer_rank=3"], "has video_mixer_rank: 0, and this configuration video_mixer_rank: 3"),
    ],
)
def test_what_contradicts_the_file_is_refused(keys, message, tmp_path):
    trained(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "own.safetensors", tmp_path / "nova", *keys)
    assert not (tmp_path / "nova").exists()
