"""LoRA of Stable Diffusion: its update is peft's, and diffusers draws the same with the exported files."""

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.lora import adapters
from tests.families.stable_diffusion.test_train_sd import PIPELINES, settings_of
from tests.warpcore.runs import load_weights, read_metrics
from train.train_sd_lora import TrainSdLora
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
CLASSES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
LORA = {"module_filters": ["to_q", "to_out"], "rank": 2, "lr": 0.01}
TEXT = {"text_encoder_filters": ["self_attn", "mlp"], "text_encoder_lr": 0.005}


def train(settings, kind=TrainSdLora) -> TrainSdLora:
    keys = TrainSdLora.Config.model_fields
    run = kind(make_config(TrainSdLora.Config, {key: value for key, value in settings.items() if key in keys}))
    assert run.run() == 0
    return run


class Recorded(TrainSdLora):
    """Keeps what the update starts from, and what the U-Net saw."""

    def build(self):
        networks = super().build()
        torch.manual_seed(5)
        for network in self.adapted(networks).values():
            for _, _, adapter in adapters(network):
                adapter.up.data = torch.randn_like(adapter.up) * 0.2
        self.start = {name: tensor.clone() for name, tensor in of_networks(self.adapted(networks)).items()}
        return networks

    def encode(self, batch, random):
        self.captions = list(batch.captions)
        return super().encode(batch, random)

    def denoising_loss(self, latents, random, predict, *further):
        def recorded(noised, times):
            self.seen = {"noised": noised, "times": times, "noise": random.normal("noise", *latents.shape[1:])}
            self.seen["predicted"] = predict(noised, times).detach()
            return predict(noised, times)

        self.told = predict.keywords
        return super().denoising_loss(latents, random, recorded, *further)


def of_networks(networks) -> dict[str, torch.Tensor]:
    return {f"{name}.{place}.lora.{part}": getattr(adapter, part)
            for name, network in networks.items() for place, _, adapter in adapters(network)
            for part in ("down", "up")}  # fmt: skip


def with_peft(pipeline, **settings) -> dict[str, torch.Tensor]:
    """Adapters of peft in the pipeline's networks: their parameters by the names of ours."""
    found = {}
    of_text = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    targets = {"unet": ["to_q", "to_out.0"], "text_encoder": of_text, "text_encoder_2": of_text}
    for name, modules in targets.items():
        if (network := getattr(pipeline, name, None)) is None:
            continue
        network.requires_grad_(False)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules, **settings)
        peft.inject_adapter_in_model(config, network)
        for parameter, tensor in network.named_parameters():
            if ".lora_" in parameter:
                place, part = parameter.removesuffix(".default.weight").rsplit(".lora_", 1)
                found[f"{name}.{place}.lora.{'down' if part == 'A' else 'up'}"] = tensor.requires_grad_(True)
    return found


def text_conditions(pipeline, captions) -> dict[str, torch.Tensor]:
    """As diffusers' training examples make them."""

    def read(tokenizer, encoder):
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        return encoder(ids, output_hidden_states=True)

    one = read(pipeline.tokenizer, pipeline.text_encoder)
    if not hasattr(pipeline, "text_encoder_2"):
        return {"encoder_hidden_states": one.last_hidden_state}
    two = read(pipeline.tokenizer_2, pipeline.text_encoder_2)
    hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    return {"encoder_hidden_states": hidden, "text_embeds": two.text_embeds}


@pytest.mark.parametrize("version", PIPELINES)
def test_an_update_is_that_of_peft_on_the_library_s_networks(tmp_path, version, capfd):
    """U-Net and text encoders: forward, loss, gradients, clipping and AdamW with two learning rates. Adapters that get
    no gradient are told at the start, and a key of other targets than that of the file."""
    settings = settings_of(tmp_path, version, caption_dropout=0.0, weight_decay=0.1, min_sigma=0.1, **LORA, **TEXT)
    run = train(settings, Recorded)
    said = capfd.readouterr().err
    assert "min_sigma has no effect without diffusion_target: rectified_flows" in said
    pipeline = CLASSES[version].from_pretrained(tmp_path / "pipeline")
    theirs = with_peft(pipeline)
    assert theirs.keys() == run.start.keys()
    with torch.no_grad():
        for name, tensor in theirs.items():
            tensor.copy_(run.start[name])
    told = text_conditions(pipeline, run.captions)
    hidden = told.pop("encoder_hidden_states")
    added = told | ({"time_ids": run.told["time_ids"]} if told else {})
    seen = run.seen
    predicted = pipeline.unet(
        seen["noised"], seen["times"], hidden, added_cond_kwargs=added or None, return_dict=False
    )[0]  # fmt: skip
    torch.testing.assert_close(hidden, run.told["encoder_hidden_states"])
    torch.testing.assert_close(predicted, seen["predicted"])
    loss = (predicted - seen["noise"]).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    of_text = [tensor for name, tensor in theirs.items() if name.startswith("text")]
    of_unet = [tensor for name, tensor in theirs.items() if name.startswith("unet")]
    groups = [{"params": of_unet, "lr": 0.01}, {"params": of_text, "lr": 0.005}]
    torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1).step()
    (line,) = read_metrics(settings)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    unread = [name for name, tensor in theirs.items() if tensor.grad is None]
    assert all(name.startswith("text_encoder.") for name in unread)
    assert bool(unread) == (version == "sdxl")
    assert (f"text_encoder: {len(unread)} trained tensors never learn" in said) == bool(unread)
    assert "text_encoder_2: " not in said
    after = load_weights(settings, "lora")
    assert after.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.grad is None:  # a layer behind the hidden states that SDXL takes
            assert torch.equal(after[name], run.start[name])
        elif tensor.grad.abs().max() > 1e-7:  # else Adam divides what is nothing but rounding
            torch.testing.assert_close(after[name], tensor.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
            assert (after[name] - run.start[name]).abs().max() > 1e-3, name


def test_a_lora_is_not_resumed_on_another_pipeline(tmp_path):
    settings = settings_of(tmp_path, "sd15") | LORA
    train(settings)
    weights = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=r"this run was trained on .*pipeline .*holds other weights"):
        train(settings | {"updates": 2})
