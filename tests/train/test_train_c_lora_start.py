"""What a LoRA starts from: files with another scale, and runs of versions in which '.' found fewer layers."""

from pathlib import Path

import pytest
import torch

import modules.lora
from families.cascade.lora import load_into, outline
from families.cascade.lora_files import read_lora, write_lora
from families.common.lora_training import lora_of
from modules.lora import LoraSettings, add_adapters
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model, small_inputs
from tests.train.test_train_c_lora import LORA, train
from tests.warpcore.runs import load_weights
from warpcore.errors import UserError

CONDITIONS = {"clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper"}


def adapted(**settings):
    network = golden_model("stage_c_small")[0]
    add_adapters(network, [".attn", "clf.1"], LoraSettings(**{"rank": 4, "alpha": 4} | settings))
    return network


@pytest.mark.parametrize("form", ["warpcore", "comfyui", "peft"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("of_file", "of_run"),
    [
        ({"alpha": 4}, {"alpha": 32}),
        ({"alpha": 1}, {"alpha": 4}),
        ({"alpha": 4, "rank_stabilised": True}, {"alpha": 4}),
        ({"alpha": 4}, {"alpha": 3, "rank_stabilised": True}),
        ({"alpha": 2, "rank_stabilised": True}, {"alpha": 2, "rank_stabilised": True}),
    ],
)
def test_a_run_starts_from_the_change_that_the_file_makes(form, dora, of_file, of_run, tmp_path):
    network, path = randomised(adapted(dora=dora, **of_file)), tmp_path / "x.safetensors"
    path = tmp_path if form == "peft" else path
    write_lora(lora_of(network), path, form)
    started = adapted(dora=dora, **of_run)
    load_into(started, None, path, [".attn"])
    with torch.no_grad():
        output, expected = started(**small_inputs()), network(**small_inputs())
        assert (expected - golden_model("stage_c_small")[0](**small_inputs())).abs().max() > 0.01
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for (name, adapter), other in zip(
        lora_of(started).adapters.items(), lora_of(network).adapters.values(), strict=True
    ):
        assert adapter.alpha == of_run["alpha"], name
        assert torch.equal(adapter.down, other.down)


def run_folder(settings: dict) -> Path:
    return Path(settings["checkpoint_path"]) / settings["experiment_id"]


@pytest.mark.integration
def test_lora_checkpoint_path_of_another_alpha_starts_at_the_strength_of_the_file(small_cascade):
    first = small_cascade | LORA | {"alpha": 1, "lr": 0.1}
    train(first)
    file = run_folder(first) / "lora.safetensors"
    further = {"experiment_id": "further", "lora_checkpoint_path": str(file), "lr": 1e-12, "alpha": 24}
    run = train(first | further)
    network = outline(run.config)
    before, after = read_lora(file, network), read_lora(run_folder(first | further) / "lora.safetensors", network)
    for name, adapter in after.adapters.items():
        was = before.adapters[name]
        torch.testing.assert_close(adapter.scale * adapter.up @ adapter.down, was.scale * was.up @ was.down)
        assert (was.up @ was.down).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.integration
def test_a_dot_adapts_every_layer_and_an_earlier_run_keeps_its_layers(small_cascade, monkeypatch, caplog):
    settings = small_cascade | LORA | {"module_filters": ["."], "save_every": 1}
    with monkeypatch.context() as earlier:
        earlier.setattr(modules.lora, "EVERY_LAYER", "no filter")  # '.' was a part of a name, as any other
        train(settings)
    old = load_weights(settings, "lora")
    assert not CONDITIONS & {name.partition(".")[0] for name in old}
    train(settings | {"updates": 2})
    assert load_weights(settings, "lora").keys() == old.keys()
    new = settings | {"experiment_id": "new"}
    train(new)
    assert {name.partition(".")[0] for name in load_weights(new, "lora").keys() - old.keys()} == CONDITIONS
    train(new | {"updates": 2})
    assert load_weights(new, "lora").keys() > old.keys()
    file = run_folder(settings) / "lora.safetensors"
    start = settings | {"experiment_id": "start", "lora_checkpoint_path": str(file)}
    with pytest.raises(UserError, match=r"clip_img_mapper is not in the file. Write module_filters: \['\\\.'\]"):
        train(start)
    train(start | {"module_filters": ["\\."]})
    assert load_weights(start, "lora").keys() == old.keys()
