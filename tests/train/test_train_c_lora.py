"""LoRA training: a step against peft on diffusers' network, runs in pieces and processes, and what samples are."""

import io
import json
import math
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from PIL import Image
from safetensors import safe_open

from families.cascade import versions
from families.common import lora_training
from modules.lora import adapters
from tests.golden import load_case, weights_of
from tests.many_processes import launch_processes
from tests.train.test_train_c import diffusers_network
from tests.warpcore.runs import load_weights, numbers, read_metrics
from train.train_c_lora import TrainLora
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.processes import Processes

pytestmark = pytest.mark.integration

LORA = {"module_filters": [".attn"], "rank": 3}


def train(settings: dict, kind=TrainLora) -> TrainLora:
    run = kind(make_config(TrainLora.Config, settings))
    assert run.run() == 0
    return run


def test_an_update_equals_one_with_peft_on_diffusers_network(small_cascade):
    """Forward, loss, gradients, clipping and AdamW, with q, k and v adapted apart as peft does."""
    settings = small_cascade | LORA | {"split_qkv": True, "alpha": 2, "weight_decay": 0.1}
    seen = {}

    class Recorded(TrainLora):
        def build(self):
            networks = super().build()
            torch.manual_seed(5)
            for _, _, adapter in adapters(networks["generator"]):
                adapter.up.data = torch.randn_like(adapter.up) * 0.2
            seen["start"] = {n: t.clone() for n, t in networks["generator"].state_dict().items() if ".lora." in n}
            return networks

        def denoising_loss(self, latents, random, predict, **kwargs):
            def recorded(noised, r):
                seen.update(noised=noised, r=r, conditions=predict.keywords)
                seen["predicted"] = predict(noised, r)
                return seen["predicted"]

            losses = super().denoising_loss(latents, random, recorded, **kwargs)
            seen.update(latents=latents, noise=random.normal("noise", *latents.shape[1:]))
            return losses

    train(settings, Recorded)
    spec, tensors = load_case("stage_c_small")
    network = diffusers_network(spec["constructor"])
    network.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights_of(spec, tensors)))
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    network = peft.get_peft_model(network, config)
    theirs = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def their_name(name: str) -> str:
        layer, _, tensor = name.rpartition(".")
        matrix = {"down": "lora_A", "up": "lora_B"}[tensor]
        layer = layer.replace(".attn.out_proj.lora", ".to_out.0").replace(".attn.lora.", ".to_")
        return f"base_model.model.{layer}.{matrix}.default.weight"

    with torch.no_grad():
        for name, tensor in seen["start"].items():
            theirs[their_name(name)].copy_(tensor)
    assert len(seen["start"]) == len(theirs)
    predicted = network(seen["noised"], seen["r"], **seen["conditions"], return_dict=False)[0]
    torch.testing.assert_close(predicted, seen["predicted"], rtol=0, atol=1e-5)
    # P2 weights 1 / (1 + SNR); the cosine schedule gives alpha-bar at the time that the network is told.
    alpha_bar = torch.cos((seen["r"] + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    loss = ((predicted - seen["noise"]).square().mean(dim=(1, 2, 3)) * (1 - alpha_bar.clamp(0.0001, 0.9999))).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    torch.optim.AdamW(theirs.values(), lr=0.001, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1).step()
    (line,) = read_metrics(settings)
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    after = load_weights(settings, "lora")
    assert after.keys() == seen["start"].keys()
    for name, tensor in after.items():
        torch.testing.assert_close(
            tensor, theirs[their_name(name)], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (tensor - seen["start"][name]).abs().max() > 9e-4


EVERYTHING = {
    "module_filters": [".attn", "channelwise", "depthwise"], "rank": 3, "dora": True, "lora_dropout": 0.2, "lr": 0.01,
    "train_tokens": [["[dog]", "^picture</w>"], ["^w3", None]], "token_lr_scale": 2.0,
    "caption_templates": ["a [dog]", "a picture of [dog], w3 {caption}"], "ema_start_iters": 1, "ema_beta": 0.5,
    "validation_samples": 2, "log_every": 1, "save_every": 2, "sample_steps": 2, "sample_count": 1,
}  # fmt: skip


@pytest.mark.bits
def test_a_run_goes_on_exactly_with_adapters_tokens_and_averages(small_cascade):
    settings = small_cascade | EVERYTHING | {"updates": 4, "activation_checkpointing": 3}
    whole = settings | {"experiment_id": "whole"}
    for one in (whole, settings | {"updates": 2}, settings):
        train(one)
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))
    for name in ("lora", "lora_ema"):
        ours, theirs = load_weights(settings, name), load_weights(whole, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert ours["tokens.delta"].abs().min() > 0  # both tokens learn, through the text tower
    assert not torch.equal(load_weights(settings, "lora")["tokens.delta"], ours["tokens.delta"])


def test_checkpoints_hold_what_is_trained_and_nothing_else(small_cascade):
    settings = small_cascade | EVERYTHING
    run = train(settings)
    weights = load_weights(settings, "lora")
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"]
    trained = sum(tensor.numel() for name, tensor in weights.items() if name != "tokens.initial")
    stored = run.checkpoints.stored(1)
    assert sum(math.prod(shape) for name, (shape, _) in stored.items() if name.endswith(".exp_avg")) == trained
    assert {n.split("/")[0] for n in stored} == {"network", "ema", "optimizer"}
    assert not [
        name for name in stored if name.startswith("network/") and ".lora." not in name and "tokens" not in name
    ]
    with safe_open(folder / "lora.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["tokens"]) == ["[dog]", "w3</w>"]
    assert (json.loads(about["rank"]), json.loads(about["alpha"]), about["update"]) == (3, 3, "1")
    assert about["model_version"] == "mini"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use_fsdp", "changes"),
    [
        pytest.param(True, {}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
        (True, EVERYTHING | {"frozen_weights": "bfloat16", "lora_dropout": 0.0}),
    ],
    ids=["sharded", "replicated", "sharded, bfloat16 weights, DoRA, tokens"],
)
def test_two_processes_make_the_updates_of_one(small_cascade, use_fsdp, changes):
    updates = 3 if changes else 20
    settings = small_cascade | LORA | {"log_every": 1, "lr": 0.01, "updates": updates, "micro_batch_size": 2} | changes
    settings |= {"save_every": updates, "experiment_id": "one"}
    train(settings)
    together = settings | {"experiment_id": "two", "use_fsdp": use_fsdp}
    launch_processes(2, _member, together, versions.VERSIONS["mini"])
    expected = read_metrics(settings)
    assert len(expected) == updates
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-3
    for line, other in zip(expected, read_metrics(together), strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5 if not changes else 1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    ours, theirs = load_weights(together, "lora"), load_weights(settings, "lora")
    assert all(torch.allclose(ours[name], tensor, atol=2e-3) for name, tensor in theirs.items())


def _member(settings: dict, mini: versions.Version) -> None:
    versions.VERSIONS["mini"] = mini
    train(settings)


def write_samples(path: Path, masks: list[Image.Image | None], captions: bool = True) -> str:
    with tarfile.open(path, "w") as tar:
        for i, mask in enumerate(masks):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            members = {"png": Image.fromarray(pixels)} | ({"mask.png": mask} if mask else {})
            for extension, picture in members.items():
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                info = tarfile.TarInfo(f"{path.stem}{i}.{extension}")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
            if captions:
                info = tarfile.TarInfo(f"{path.stem}{i}.txt")
                info.size = len(b"a picture")
                tar.addfile(info, io.BytesIO(b"a picture"))
    return str(path)


def test_masked_parts_do_not_count_and_samples_without_a_mask_count_everywhere(small_cascade, tmp_path):
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    data = write_samples(tmp_path / "m.tar", [left, left, None, None])
    seen = {}

    class Recorded(TrainLora):
        def denoising_loss(self, latents, random, predict):
            def recorded(noised, r):
                seen["error"] = predict(noised, r) - random.normal("noise", *latents.shape[1:])
                return seen["error"] + random.normal("noise", *latents.shape[1:])

            seen["losses"] = super().denoising_loss(latents, random, recorded)
            return seen["losses"]

    train(small_cascade | LORA | {"webdataset_path": data, "masked_loss": True}, Recorded)
    squared = seen["error"].square().detach()
    width = squared.shape[3]
    halves, wholes = squared[..., : width // 2].mean(dim=(1, 2, 3)), squared.mean(dim=(1, 2, 3))
    masked = torch.isclose(seen["losses"].raw, halves)
    assert masked.sum() == 2
    torch.testing.assert_close(seen["losses"].raw[~masked], wholes[~masked])


def test_samples_of_the_prior_keep_their_captions_and_count_by_their_weight(small_cascade, tmp_path):
    seen = {}

    class Recorded(TrainLora):
        def loss(self, inputs, random):
            losses, self.sample_weight = super().loss(inputs, random), None
            plain = super().loss(inputs, random)
            seen["share"] = (losses.loss / plain.loss).detach()
            return losses

        def encode(self, batch, random):
            seen["keys"] = batch.keys
            self.networks["text"].tokenize = lambda texts: seen.setdefault("texts", texts) and tokenize(texts)
            tokenize = type(self.networks["text"]).tokenize.__get__(self.networks["text"])
            inputs = super().encode(batch, random)
            del self.networks["text"].tokenize
            return inputs

    settings = small_cascade | LORA | {
        "webdataset_path": write_samples(tmp_path / "own.tar", [None] * 2, captions=True), "caption_dropout": 0.0,
        "prior_path": write_samples(tmp_path / "prior.tar", [None] * 2), "prior_weight": 0.25,
        "train_tokens": [["[dog]", None]], "caption_templates": ["[dog]"],
    }  # fmt: skip
    run = train(settings, Recorded)
    prior = [key.startswith("prior") for key in seen["keys"]]
    assert sorted(prior) == [False, False, True, True]
    assert seen["texts"] == ["a picture" if is_prior else "[dog]" for is_prior in prior]
    torch.testing.assert_close(seen["share"], torch.tensor([0.25 if is_prior else 1.0 for is_prior in prior]))
    again = make_config(TrainLora.Config, run.config.model_dump(mode="json"))  # as saved in the run's folder
    assert again.webdataset_path == run.config.webdataset_path == [settings["webdataset_path"], settings["prior_path"]]


def test_pictures_need_no_captions_where_the_templates_say_it_all(small_cascade, tmp_path):
    data = write_samples(tmp_path / "bare.tar", [None] * 4, captions=False)
    settings = small_cascade | LORA | {"webdataset_path": data, "caption_templates": ["a picture"]}
    train(settings)
    with pytest.raises(UserError, match=r"no sample has a .txt"):
        train(settings | {"experiment_id": "own", "caption_templates": ["{caption}"]})


def test_a_lora_goes_on_from_a_file(small_cascade, tmp_path):
    settings = small_cascade | EVERYTHING | {"ema_start_iters": None}
    train(settings)
    first = Path(settings["checkpoint_path"]) / settings["experiment_id"] / "lora.safetensors"
    further = settings | {"experiment_id": "further", "lora_checkpoint_path": str(first), "lr": 1e-12}
    train(further)
    before, after = load_weights(settings, "lora"), load_weights(further, "lora")
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())
    with pytest.raises(UserError, match=r"down_blocks.0.0.depthwise: down is \(3, 1, 3, 3\) in the file and \(2, "):
        train(further | {"experiment_id": "x", "rank": 2})
    with pytest.raises(UserError, match=r"does not hold what this run trains: .*channelwise.* is only in the file"):
        train(further | {"experiment_id": "y", "module_filters": [".attn", "depthwise"]})


@pytest.mark.bits
def test_samples_show_base_and_lora_side_by_side(small_cascade):
    settings = small_cascade | EVERYTHING | {"lr": 0.1, "updates": 3, "sample_prompts": ["a picture of [dog]"]}
    run = TrainLora(make_config(TrainLora.Config, settings))
    drawn = []
    run.sample = lambda held_out: drawn.append(TrainLora.sample(run, held_out)) or drawn[-1]
    assert run.run() == 0
    first, last = drawn[0][0].pictures, drawn[-1][0].pictures
    assert list(last) == ["base", "LoRA"]
    assert np.array_equal(first["base"], last["base"])
    assert not np.array_equal(last["base"], last["LoRA"])


def test_mistakes_are_named(small_cascade, tmp_path):
    def refusal(**changes) -> str:
        with pytest.raises(UserError) as error:
            train(small_cascade | LORA | changes)
        return str(error.value)

    message = refusal(module_filters=[".atn"])
    assert "module_filters" in message
    assert "'.atn' finds no layer" in message
    assert "attention.attn" in message
    assert "rank 70 is more than down_blocks.0.2.attention.attn.out_proj has, a weight of 64 x 64" in refusal(rank=70)
    assert "in brackets" in refusal(train_tokens=[["fernando", None]])
    assert "'^dog' finds no token" in refusal(train_tokens=[["[fernando]", "^dog"]])
    assert "train_tokens is empty" in refusal(train_tokens=[])
    message = refusal(lora_checkpoint_path=str(tmp_path / "previewer.safetensors"))
    assert "it is no LoRA" in message
    assert "previewer.safetensors" in message
    assert "there is no LoRA file nowhere" in refusal(lora_checkpoint_path="nowhere.safetensors")
    for changes, said in [
        ({"caption_templates": ["{name}"]}, "{name}"),
        ({"caption_templates": ["a dog"], "train_tokens": [["[dog]", None]]}, r"holds the token \[dog\]"),
        ({"module_filters": None}, "module_filters"),
    ]:
        with pytest.raises(ConfigError, match=said):
            make_config(TrainLora.Config, small_cascade | LORA | changes)


def test_four_bit_weights_are_for_one_process_and_need_torchao(small_cascade, monkeypatch):

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="frozen_weights: nf4 needs torchao: pip install torchao"):
        train(small_cascade | LORA | {"frozen_weights": "nf4"})
    config, two = SimpleNamespace(frozen_weights="nf4", swap_blocks=0), Processes(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="frozen_weights: nf4 cannot be sharded"):
        lora_training.freeze(torch.nn.Linear(2, 2), config, torch.float32, two)


def test_a_run_with_four_bit_weights(small_cascade):
    pytest.importorskip("torchao.quantization", reason="an optional package")
    settings = small_cascade | EVERYTHING | {"frozen_weights": "nf4", "updates": 4, "dtype": "bfloat16"}
    train(settings | {"updates": 2})
    train(settings)
    assert all(line["grad_norm"] > 0 for line in read_metrics(settings))
    assert load_weights(settings, "lora").keys() == load_weights(settings, "lora_ema").keys()
