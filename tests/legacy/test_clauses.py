"""Where the present code means something else by a config, old runs go on, or stop and name what goes on."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.legacy.test_legacy import check_lines, go_on, use_case_of
from warpcore.config import load_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("has_others", [False, True])
def test_a_run_in_a_folder_named_tilde_is_named_with_the_command_that_goes_on(old_files, home, has_others):
    if has_others:
        (home / "runs" / "other").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        go_on("~/runs/home", "configs/home.yaml")
    assert str(old_files / "~/runs") in str(error.value)
    assert not (home / "runs" / "home").exists()
    command = str(error.value).split("To go on with what it holds: ")[1].splitlines()[0]
    subprocess.run(command, shell=True, check=True)
    go_on("~/runs/home", "configs/home.yaml")
    check_lines(home / "runs" / "home", "~/runs/home")


def test_a_validation_and_drawing_that_an_old_save_lacks_are_made_before_the_run_goes_on(old_files):
    run, picture = Path("runs/tiny"), Path("runs/tiny/samples/00000002.png")
    before = np.asarray(Image.open(picture))
    shutil.rmtree(picture.parent)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lacking = [{key: value for key, value in line.items() if "validation" not in key} for line in lines]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lacking))
    go_on("runs/tiny", "configs/tiny.yaml")
    check_lines(run, "runs/tiny")
    assert np.array_equal(np.asarray(Image.open(picture)), before)


def test_a_backup_alone_saves_weights_and_state_and_neither_validates_nor_draws(old_files):
    run = Path("runs/tiny")
    go_on("runs/tiny", "configs/tiny.yaml", "save_every=4", "backup_every=3", "keep_last=5")
    assert (run / "state" / "00000003" / "manifest.json").exists()
    assert (run / "backups" / "00000003" / "generator.safetensors").exists()
    assert not (run / "samples" / "00000003.png").exists()
    assert [line["update"] for line in _lines(run) if "validation_loss" in line] == [2, 4]


def test_masks_that_no_sample_has_stop_a_new_run_and_no_old_one(old_files):
    with pytest.raises(UserError, match="masked_loss"):
        begin("lora_masked")
    go_on("runs/lora_masked", "configs/lora_masked.yaml")
    check_lines(Path("runs/lora_masked"), "runs/lora_masked")


def test_every_layer_of_an_old_lora_is_what_it_was_and_of_a_new_one_is_every_layer(old_files):
    go_on("runs/lora_everywhere", "configs/lora_everywhere.yaml")
    old = load_file("runs/lora_everywhere/lora.safetensors")
    begin("lora_everywhere")
    new = load_file("runs/new/lora.safetensors")
    assert old.keys() < new.keys()


def test_a_new_run_takes_an_old_cache_unless_a_caption_has_other_token_ids(old_files):
    begin("cached_bpe")
    with pytest.raises(UserError, match=r"cache_quotes .*token_ids .*tools/cache\.py"):
        begin("cached_quotes")


def test_a_key_that_an_old_config_has_and_its_script_does_not_use_is_a_message(old_files, caplog):
    go_on("runs/stage_c", "configs/stage_c.yaml")
    check_lines(Path("runs/stage_c"), "runs/stage_c")
    assert "stage_a_checkpoint_path: this script has no use for it" in caplog.text
    with pytest.raises(UserError, match="stage_a_checkpoint_path"):
        begin("stage_c")


def begin(name: str) -> None:
    """A new run with the config of an old one."""
    place = f"runs/{name}"
    use_case = use_case_of(place)
    run = use_case(load_config(use_case.Config, [f"configs/{name}.yaml", "experiment_id=new", "updates=1"]))
    assert run.run() == 0


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
