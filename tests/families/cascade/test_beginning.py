"""Training obeys what weights files say of themselves, or contradicts it aloud; a resumed run stays what it was."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from families.cascade.training import DenoiserTraining
from families.common.weight_files import metadata_of
from modules.clip import ClipSettings, TextTower
from tests.warpcore.runs import read_metrics
from train.train_c import TrainStageC
from train.train_c_lora import TrainLora
from warpcore.config import make_config
from warpcore.core import WarpCore
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
LORA = {"module_filters": [".attn"], "rank": 1}


def train(kind: type[WarpCore], settings: dict) -> WarpCore:
    run = kind(make_config(kind.Config, settings))
    assert run.run() == 0
    return run


def refusal(kind: type[WarpCore], settings: dict) -> str:
    with pytest.raises(UserError) as error:
        train(kind, settings)
    return str(error.value)


def folder(settings: dict) -> Path:
    return Path(settings["checkpoint_path"]) / settings["experiment_id"]


def say(settings: dict, **about: str) -> None:
    """Let the weights file that a run starts from say this of itself."""
    path = Path(settings["generator_checkpoint_path"])
    save_file(load_file(path), path, metadata=about)


def test_a_run_trains_what_its_base_predicts(small_cascade):
    say(small_cascade, diffusion_target="v")
    run = train(TrainStageC, small_cascade)
    assert type(run.diffusion.target).__name__ == "VTarget"
    assert yaml.safe_load((folder(small_cascade) / "config.yaml").read_text())["diffusion_target"] == "v"
    about = metadata_of(folder(small_cascade) / "generator.safetensors")
    assert (about["diffusion_target"], about["model_version"]) == ("v", "mini")
    silent = small_cascade | {"experiment_id": "silent"}
    say(silent)
    assert train(TrainStageC, silent).config.diffusion_target == "epsilon"


def test_a_config_that_contradicts_its_base_is_refused_unless_it_wants_the_change(small_cascade):
    say(small_cascade, diffusion_target="epsilon")
    wrong = small_cascade | {"diffusion_target": "v"}
    message = refusal(TrainStageC, wrong)
    assert "diffusion_target: v contradicts" in message
    assert "generator.safetensors" in message
    assert "change_target: true" in message
    run = train(TrainStageC, wrong | {"change_target": True})
    assert (
        metadata_of(folder(wrong) / "generator.safetensors")["diffusion_target"] == run.config.diffusion_target == "v"
    )
    say(small_cascade, model_version="1B")
    assert "model_version 1B, not mini" in refusal(TrainStageC, small_cascade | {"experiment_id": "version"})


def test_a_resumed_run_keeps_the_target_of_its_checkpoint(small_cascade):
    """As of runs that began when a base was not asked: they were trained as epsilon, whatever the base says."""
    train(TrainStageC, small_cascade)
    say(small_cascade, diffusion_target="v")
    for given in ({"updates": 2}, {"updates": 3, "diffusion_target": "epsilon"}):
        assert train(TrainStageC, small_cascade | given).config.diffusion_target == "epsilon"
    assert metadata_of(folder(small_cascade) / "generator.safetensors")["diffusion_target"] == "epsilon"
    other = small_cascade | {"updates": 4, "diffusion_target": "v"}
    assert "diffusion_target was epsilon and is now v" in refusal(TrainStageC, other)


def test_weights_to_start_from_fit_the_run(small_cascade):
    settings = small_cascade | LORA
    train(TrainLora, settings)
    lora = folder(settings) / "lora.safetensors"
    assert metadata_of(lora)["model_version"] == "mini"
    say(settings, diffusion_target="v")
    again = settings | {"experiment_id": "again", "lora_checkpoint_path": str(lora)}
    message = refusal(TrainLora, again)
    assert "lora_checkpoint_path" in message
    assert "diffusion_target epsilon, not v" in message
    train(TrainLora, again | {"change_target": True})


@pytest.mark.parametrize(
    ("script", "steering"), [("train_c_lora", LORA), pytest.param("train_c_controlnet", {}, marks=pytest.mark.slow)]
)
def test_what_steers_a_base_is_not_resumed_on_another(small_cascade, tmp_path, script, steering):
    kind = {"train_c_lora": "TrainLora", "train_c_controlnet": "TrainControlNet"}[script]
    kind = getattr(importlib.import_module(f"train.{script}"), kind)
    if not steering:
        steering = {"controlnet_blocks": [1, 4], "controlnet_filter": "InpaintFilter"}
    settings = small_cascade | steering
    train(kind, settings)
    base = Path(settings["generator_checkpoint_path"])
    base.rename(tmp_path / "renamed.safetensors")
    renamed = settings | {"updates": 2, "generator_checkpoint_path": str(tmp_path / "renamed.safetensors")}
    train(kind, renamed)
    save_file({name: tensor + 1e-3 for name, tensor in load_file(tmp_path / "renamed.safetensors").items()}, base)
    message = refusal(kind, settings | {"updates": 3})
    assert f"was trained on {tmp_path / 'renamed.safetensors'}" in message
    assert f"{base} holds other weights" in message
    assert "experiment_id" in message


@pytest.mark.slow
def test_a_run_that_began_before_conventions_changed_keeps_its_own(small_cascade, tmp_path):
    """Token ids and loss weights: in every later start, with what is computed in between."""

    class Before(TrainStageC):
        def __init__(self, config):
            super().__init__(config)
            self.kept = dict(DenoiserTraining.first_conventions)

        def build(self):
            networks = super().build()
            self.kept = {}  # its checkpoints say nothing of them
            return networks

    class Watched(TrainStageC):
        def build(self):
            networks = super().build()
            self.tokens = networks["text"].tokenizer.name
            return networks

    text = TextTower(ClipSettings(embed_dim=40, text_cfg={"width": 48, "heads": 4, "layers": 1, "context_length": 8}))
    text.save(tmp_path / "pairs.safetensors")
    settings = small_cascade | {
        "clip_text_model_name": str(tmp_path / "pairs.safetensors"), "loss_weight": "min_snr", "log_every": 1,
    }  # fmt: skip
    old = settings | {"experiment_id": "old"}
    train(Before, old)
    for updates in (2, 3):
        resumed = train(Watched, old | {"updates": updates})
        assert resumed.tokens == "open_clip"
    new = train(Watched, settings | {"updates": 3})
    assert new.tokens == "clip"
    logsnr = torch.tensor([-3.0, 0.0, 3.0])
    capped = logsnr.exp().clamp(max=5)
    torch.testing.assert_close(resumed.diffusion.loss_weight(logsnr), capped)
    torch.testing.assert_close(new.diffusion.loss_weight(logsnr), capped / logsnr.exp())
    assert read_metrics(old)[-1]["raw_loss"] != read_metrics(settings)[-1]["raw_loss"]
