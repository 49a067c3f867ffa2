"""Weights of STDiT3 in the published forms, and back; LoRAs of it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common.lora import adapters_of, add_adapters
from families.common.lora_files import write_loras
from families.common.lora_formats import Lora
from families.common.weight_files import GENERATOR
from families.open_sora import build
from families.open_sora.config import OpenSoraSettings
from families.open_sora.files import EMPTY
from families.registry import family_of
from modules.lora import LoraSettings
from tests.clips import write_clips
from tests.families.open_sora.tiny import random_network, small_settings
from tests.modules.test_lora import randomised
from tests.warpcore.runs import read_metrics
from train.train_stdit import TrainStdit
from train.train_stdit_lora import TrainStditLora
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


def export(*arguments: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["export.py", *arguments])
    importlib.import_module("tools.export").main()


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return build.network(OpenSoraSettings(model_version="mini", generator_checkpoint_path=path)).state_dict()


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def test_published_forms_are_read_strictly(small_mini, tmp_path):
    state = random_network().state_dict()
    folder, parts = tmp_path / "hub", tmp_path / "parts"
    for one in (folder, parts):
        one.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["STDiT3"], "model_type": "STDiT3"}))
    save_file(state, folder / "model.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    names, map_ = sorted(state), {}
    for number, some in enumerate((names[::2], names[1::2])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, parts / file)
        map_ |= dict.fromkeys(some, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    for place in (folder, folder / "model.safetensors", tmp_path / "weights.pth", parts):
        assert equal(loaded(place), state)
    del state["t_block.1.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{GENERATOR}: .*t_block.1.bias is missing in the file"):
        loaded(folder)


@pytest.mark.parametrize("rows", [5, 40])
def test_an_empty_text_of_another_length_is_cut_or_its_last_row_repeated(rows, small_mini, tmp_path):
    state = random_network(model_max_length=rows).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    found, own = loaded(tmp_path / "weights.pth")[EMPTY], state[EMPTY]
    assert torch.equal(found, own[:32] if rows > 32 else torch.cat([own, own[-1:].repeat(32 - rows, 1)]))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_published_file_is_written_and_read_again(ending, small_mini, tmp_path, monkeypatch):
    state, target = random_network().state_dict(), tmp_path / f"out.{ending}"
    save_file(state, tmp_path / "own.safetensors")
    export("published", str(tmp_path / "own.safetensors"), str(target), "model_version=mini", monkeypatch=monkeypatch)
    assert equal(loaded(target), state)
    assert family_of(target).name == "open_sora"


def test_a_lora_is_trained_exported_and_merged(small_mini, tmp_path, monkeypatch):
    save_file(random_network().state_dict(), tmp_path / "base.safetensors")
    base = f"generator_checkpoint_path={tmp_path / 'base.safetensors'}"
    given = small_settings(
        tmp_path, write_clips(tmp_path / "a.tar", 4, frames=9), rank=2, updates=2, save_every=2, lr=0.1,
        generator_checkpoint_path=str(tmp_path / "base.safetensors"),
    )  # fmt: skip
    run = TrainStditLora(make_config(TrainStditLora.Config, given))
    assert run.run() == 0
    lora, folder = load_file(tmp_path / "runs" / "run" / "lora.safetensors"), tmp_path / "runs" / "run"
    assert all("attn" in name for name in lora)
    export("lora", str(folder), str(tmp_path / "lora.safetensors"), base, monkeypatch=monkeypatch)
    export("published", str(tmp_path / "base.safetensors"), str(tmp_path / "merged.pth"), "model_version=mini",
           f"lora=['{tmp_path / 'lora.safetensors'}']", monkeypatch=monkeypatch)  # fmt: skip
    merged, before = loaded(tmp_path / "merged.pth"), random_network().state_dict()
    changed = {name for name, one in before.items() if not torch.equal(merged[name], one)}
    assert changed == {name for name in before if "attn." in name and name.endswith("weight") and "norm" not in name}


ADAPTERS = {
    "LoRA": {"rank": 3}, "LoKr": {"kind": "lokr", "rank": 2, "factor": 4}, "LoHa": {"kind": "loha", "rank": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_published_weights_with_adapters_in_them_compute_what_was_trained(kind, small_mini, tmp_path, monkeypatch):
    trained, theirs = random_network().eval(), random_network().eval()
    untouched = prediction(theirs)
    save_file(trained.state_dict(), tmp_path / "base.safetensors")
    add_adapters(trained, ["attn", "mlp", "t_block"], LoraSettings(alpha=1.5, **ADAPTERS[kind]))
    lora = Lora(adapters_of(randomised(trained, 3)))
    write_loras({"transformer": lora}, tmp_path / "lora.safetensors", "warpcore", {"transformer": trained})
    export("published", str(tmp_path / "base.safetensors"), str(tmp_path / "merged.safetensors"), "model_version=mini",
           f"lora=['{tmp_path / 'lora.safetensors'}']", monkeypatch=monkeypatch)  # fmt: skip
    theirs.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    found = prediction(theirs)
    torch.testing.assert_close(found, prediction(trained), rtol=1e-4, atol=1e-4)
    assert (found - untouched).abs().max() > 0.01


def prediction(network: torch.nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 3, 4, 6, generator=random), torch.randn(2, 32, 64, generator=random)
    size = {"fps": torch.tensor([24.0, 24.0]), "height": torch.tensor([32.0, 32.0]), "width": torch.tensor([48.0] * 2)}
    return network(x, torch.tensor([40.0, 900.0]), text, **size)


def test_a_run_goes_on_from_a_checkpoint_of_the_published_program(small_mini, tmp_path, capfd):
    """Weights, average and number of updates come; that nothing is left is told, and how to begin at 0."""
    state, folder = random_network().state_dict(), tmp_path / "epoch1-global_step500"
    average = {name: tensor + 1 for name, tensor in state.items()}
    (folder / "model").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    save_file(state, folder / "model" / "model.safetensors")
    torch.save(average, folder / "ema.pt")
    (folder / "running_states.json").write_text(json.dumps({"epoch": 1, "step": 3, "global_step": 501}))
    given = small_settings(
        tmp_path, write_clips(tmp_path / "a.tar", 4, frames=9), updates=502, ema_start_iters=0, ema_beta=0.75,
        generator_checkpoint_path=str(folder), lr=1e-12, weight_decay=0,
    )  # fmt: skip
    assert TrainStdit(make_config(TrainStdit.Config, given)).run() == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "weights, average and 501 updates are taken over; not taken: optimizer, so" in told
    (line,) = read_metrics(given)
    assert line["update"] == 502
    runs = tmp_path / "runs" / "run"
    weights = load_file(runs / "generator.safetensors")
    assert all(torch.allclose(weights[name], one, rtol=0, atol=1e-6) for name, one in state.items())
    found = load_file(runs / "generator_ema.safetensors")
    for name, tensor in state.items():
        trained = name not in (EMPTY, "rope.freqs")
        torch.testing.assert_close(found[name], tensor + 0.75 if trained else tensor)
    for start, why in {None: "no ema_start_iters", 502: "ema_start_iters: 502"}.items():
        given |= {"experiment_id": f"from_{start}", "ema_start_iters": start}
        assert TrainStdit(make_config(TrainStdit.Config, given)).run() == 0
        told = " ".join(capfd.readouterr().err.split())
        assert f"weights and 501 updates are taken over; not taken: optimizer, ema.pt ({why}), so" in told
    for updates, told in {501: 501, "2e": "1?[0-9]"}.items():
        again = given | {"experiment_id": f"again_{updates}", "updates": updates}
        with pytest.raises(UserError, match=rf"is at update 501.* updates is {told}; write .*or name .*model"):
            TrainStdit(make_config(TrainStdit.Config, again)).run()
    (folder / "running_states.json").unlink()
    folder = folder.rename(tmp_path / "some")
    with pytest.raises(UserError, match="does not say how many updates were made"):
        TrainStdit(make_config(TrainStdit.Config, again | {"generator_checkpoint_path": str(folder)})).run()


@pytest.mark.slow
def test_a_run_goes_on_from_another_run_of_ours(small_mini, tmp_path):
    """As theirs with --load: with weights, average, optimizer and position in the data."""
    given = small_settings(
        tmp_path, write_clips(tmp_path / "a.tar", 8, frames=9), updates=3, ema_start_iters=0, ema_beta=0.75,
        mask_ratios={"image_head": 0.5}, batch_size=3,
    )  # fmt: skip
    found = []
    for changes in ({"updates": 2}, {"load": str(tmp_path / "runs" / "run")}, {}):
        own = given | changes | {"experiment_id": "run" if "updates" in changes else f"to_{len(found)}"}
        assert TrainStdit(make_config(TrainStdit.Config, own)).run() == 0
        found.append((read_metrics(own)[-1], tmp_path / "runs" / own["experiment_id"]))
    (_, (line, loaded_run), (expected, whole)) = found
    assert (line["update"], line["samples_hash"]) == (3, expected["samples_hash"])
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name in ("generator", "generator_ema"):
        weights = load_file(whole / f"{name}.safetensors")
        for key, tensor in load_file(loaded_run / f"{name}.safetensors").items():
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-6)
