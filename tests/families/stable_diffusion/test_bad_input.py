"""Files and folders that are something else end training and drawing with one line that names them, and status 2."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from families.common.lora_files import write_loras
from families.stable_diffusion import build
from families.stable_diffusion.config import SdSettings
from inference import text_to_image
from tests.families.stable_diffusion.original_files import original_file
from tests.families.stable_diffusion.test_drawing_sources import lora_on
from tests.families.stable_diffusion.test_single_file import Code
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from tests.tiers import represented_by
from tests.warpcore.runs import tiny_settings, write_shard
from train.train_sd import TrainSd
from train.train_sd_lora import TrainSdLora
from warpcore.errors import run_script

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return write_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Gives what a script says before it ends with status 2."""

    def refused(main, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_script(main)
        said = capfd.readouterr().err
        assert stop.value.code == 2, said
        assert "Traceback" not in said
        return " ".join(said.split())

    return refused


def pickle_with_code(sd15: Path, folder: Path) -> Path:
    Code.witness = folder / "it ran"
    torch.save({"state_dict": original_file(sd15), "x": Code()}, folder / "model.ckpt")
    return folder / "model.ckpt"


def other_architecture(sd15: Path, folder: Path) -> Path:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, folder / "flux.safetensors")
    return folder / "flux.safetensors"


def version_2(sd15: Path, folder: Path) -> Path:
    linear = {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.zeros(8, 8)}
    save_file(original_file(sd15) | linear, folder / "v2.safetensors")
    return folder / "v2.safetensors"


def folder_of_pictures(sd15: Path, folder: Path) -> Path:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").touch()
    return folder / "pictures"


def truncated(sd15: Path, folder: Path) -> Path:
    save_file(original_file(sd15), folder / "cut.safetensors")
    content = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    return folder / "cut.safetensors"


SOURCES = {
    "pickle_with_code": (pickle_with_code, "holds code"),
    "other_architecture": (other_architecture, "looks like FLUX"),
    "version_2": (version_2, "looks like Stable Diffusion 2.x"),
    "folder_of_pictures": (folder_of_pictures, "pictures is no folder of diffusers: it holds a.png"),
    "truncated": (truncated, "cannot be read as weights"),
}


@pytest.mark.parametrize("name", represented_by("pickle_with_code", of=SOURCES))
def test_weights_that_are_something_else_end_training_and_drawing(name, sd15, refused, tmp_path):
    make, message = SOURCES[name]
    source = make(sd15, tmp_path)
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 2, (64, 64)), image_size=64)
    known = {key: value for key, value in settings.items() if key in TrainSd.Config.model_fields}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(known))
    key = f"generator_checkpoint_path={source}"
    for said in (
        refused(TrainSd.main, str(tmp_path / "c.yaml"), key),
        refused(text_to_image.main, key, "model_version=sd15", "prompts=a cat", "device=cpu"),
    ):
        assert message in said
        assert str(source) in said
    assert not (tmp_path / "it ran").exists()


def test_a_lora_of_sdxl_ends_training_and_drawing_with_stable_diffusion(sd15, refused, tmp_path):
    unet = build.unet(SdSettings(model_version="sdxl", generator_checkpoint_path=write_sdxl(tmp_path / "sdxl")))
    file = tmp_path / "xl.safetensors"
    write_loras({"unet": lora_on(unet, "to_k", 1)}, file, "kohya", {"unet": unet})
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 2, (64, 64)), image_size=64)
    known = {key: value for key, value in settings.items() if key in TrainSdLora.Config.model_fields}
    lora = {
        "generator_checkpoint_path": str(sd15),
        "module_filters": ["to_k"],
        "rank": 2,
        "lora_checkpoint_path": str(file),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(known | lora))
    for said in (
        refused(TrainSdLora.main, str(tmp_path / "c.yaml")),
        refused(
            text_to_image.main, f"generator_checkpoint_path={sd15}", f"lora={file}", "prompts=a cat", "device=cpu"
        ),
    ):
        assert f"{file} is a LoRA of SDXL, and the networks here are Stable Diffusion 1.5: name a LoRA of" in said
