"""`~` in a path is the home folder: in every key of every configuration, and in the tools' arguments."""

import importlib
import sys
from pathlib import Path

import pytest

from families.cascade.controlnet import make_filter
from families.cascade.reconstruction import CascadeReconstructConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from tests.warpcore.tiny import TinyConfig
from tools.arguments import local_path
from train.train_a import StageAConfig
from train.train_b import StageBConfig
from train.train_c_controlnet import ControlNetConfig
from train.train_c_lora import LoraConfig
from train.train_encoder import EncoderConfig
from warpcore.config import load_config, make_config
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError
from warpcore.keys import local_paths


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and a working folder elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


CONFIGURATIONS = (
    StageAConfig, StageBConfig, ControlNetConfig, LoraConfig, EncoderConfig, CascadeTextToImageConfig,
    CascadeReconstructConfig,
)  # fmt: skip
PATH_KEYS = sorted({name for kind in CONFIGURATIONS for name, field in kind.model_fields.items()
                    if name.endswith(("_path", "_file", "_model_name"))})  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_every_path_key_of_every_configuration_expands_it(kind, home):
    data = ("webdataset_path", "validation_path", "prior_path")  # what these name is looked for later
    keys = [*PATH_KEYS, "run", "lora", "controlnet", "control_image", "control_mask", "image", "pictures"]
    found = local_paths(kind, {key: "~/a" for key in keys if key in kind.model_fields and key not in data})
    assert found
    assert {key for key, value in found.items() if value != f"{home}/a"} == set()


def test_a_config_file_settings_of_filters_and_data_paths_expand_it_too(home):
    (home / "c.yaml").write_text("experiment_id: x\nupdates: 1\nbatch_size: 1\nwebdataset_path: d\n")
    config = load_config(TinyConfig, ["~/c.yaml", "checkpoint_path=~/runs"])
    assert config.run_folder == home / "runs" / "x"
    values = {"controlnet_filter": "PidiFilter", "controlnet_filter_params": {"checkpoint_path": "~/table5.pth"}}
    with pytest.raises(UserError, match=f"{home}/table5.pth"):
        make_filter(make_config(ControlNetConfig, {
            "experiment_id": "x", "updates": 1, "batch_size": 1, "webdataset_path": "d", "checkpoint_path": "c",
            "generator_checkpoint_path": "g", "controlnet_blocks": [0], **values,
        }))  # fmt: skip
    write_shard(home / "data" / "a.tar", 1)
    for path in ("~/data", "~/data/a.tar", "~/data/*.tar", [{"path": "~/data"}]):
        assert resolve_sources(path)[0].shards[0].url == f"{home}/data/a.tar"


def test_an_argument_of_a_tool_expands_it(home):
    assert local_path("~/a") == home / "a"


@pytest.mark.parametrize("tool", ["memory", "search_batch_size", "cache"])
def test_a_script_and_a_config_named_to_a_tool_are_found_in_the_home_folder(tool, home, monkeypatch, capsys):
    (home / "script.py").write_text("raise SystemExit('found')")
    monkeypatch.setattr(sys, "argv", [tool, "~/script.py", "~/config.yaml", "~/out"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{tool}").main()
    assert "found" in str(ended.value) or f"{home}/config.yaml" in capsys.readouterr().err


def test_a_user_who_is_not_there_is_named():
    with pytest.raises(UserError, match="checkpoint_path: ~nobody_of_this_name/x: ~nobody_of_this_name is no user"):
        make_config(TinyConfig, tiny_settings(Path("~nobody_of_this_name/x"), Path("d")))


@pytest.mark.integration
@pytest.mark.parametrize("others", [False, True])
def test_a_run_in_a_folder_that_is_called_tilde_is_named_and_not_started_again(home, others):
    """As `checkpoint_path: ~/runs` was once understood."""
    write_shard(Path("a.tar"), 6)
    train_here(tiny_settings(Path("~/runs").absolute(), Path("a.tar"), updates=2))
    literal = Path("~/runs").absolute()
    if others:
        (home / "runs").mkdir()
    settings = tiny_settings(Path("~/runs"), Path("a.tar"), updates=4)
    name = "/tiny" if others else ""
    command = f"mkdir -p {home}/runs && mv './~/runs/tiny' {home}" if others else f"mv './~/runs' {home}/runs"
    with pytest.raises(UserError, match=f"checkpoint_path: .*{literal}{name} is, in a folder .*{command}"):
        train_here(settings)
    Path("~/runs/tiny").rename(home / "runs" / "tiny") if others else Path("~/runs").rename(home / "runs")
    train_here(settings | {"checkpoint_path": str(home / "runs")})
    assert (home / "runs" / "tiny" / "state" / "00000002").is_dir()
