"""What is drawn from: single files, folders, runs, LoRAs; and what is refused, by one clear error."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from families.common.lora_files import write_loras
from families.common.lora_formats import Adapter, Lora
from families.registry import family_of
from families.stable_diffusion import build
from families.stable_diffusion.components import find_component
from families.stable_diffusion.lora import open_loras
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from families.stable_diffusion.versions import VERSIONS
from modules.lora import places
from tests.families.stable_diffusion.original_files import original_file
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from tests.warpcore.runs import tiny_settings, write_shard
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.random import SampleRandom

SETTINGS = {"size": [64, 64], "steps": 2, "sampler": "ddim", "guidance": 3, "prompts": ["a red dog"]}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return write_sd15(tmp_path_factory.mktemp("sd15"), "clip")


def config_of(**settings) -> StableDiffusionTextToImage.Config:
    return make_config(StableDiffusionTextToImage.Config, SETTINGS | settings)


def drawn(**settings) -> Tensor:
    config = config_of(**settings)
    prompts = [prompt for prompt in config.all_prompts for _ in config.seeds]
    seeds = config.seeds * len(config.all_prompts)
    return torch.stack(StableDiffusionTextToImage(config).draw(prompts, seeds).pictures)


def lora_on(network: torch.nn.Module, end: str, seed: int) -> Lora:
    """A LoRA with random numbers on the layers whose names end so."""
    random = torch.Generator().manual_seed(seed)

    def adapter(weight: Tensor) -> Adapter:
        down, up = (torch.randn(*shape, generator=random) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        return Adapter(down, up, alpha=2.0)

    found = {name: adapter(place.weight) for name, place in places(network).items() if name.endswith(end)}
    assert found
    return Lora(found)


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".ckpt", marks=pytest.mark.slow)])
def test_a_single_file_draws_as_its_folder(sd15, tmp_path, monkeypatch, suffix):
    """Single files do not say how large their networks are: those of published sizes are known, and here tiny ones."""
    file = tmp_path / f"model{suffix}"
    tensors = {name: tensor.contiguous() for name, tensor in original_file(sd15).items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    tiny = config_of(generator_checkpoint_path=sd15)
    parts = (build.generator_source(tiny), build.autoencoder_source(tiny), find_component(sd15, "text_encoder", "x"))
    unet, autoencoder, text = (part.config for part in parts)
    known = replace(VERSIONS["sd15"], unet=unet, autoencoder=autoencoder, text=(text,))
    monkeypatch.setitem(VERSIONS, "sd15", known)
    assert family_of(file).name == "stable_diffusion"
    # Processors add up in another order where weights lie otherwise in memory: no equal bits.
    assert_close(drawn(generator_checkpoint_path=file), drawn(generator_checkpoint_path=sd15), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_part_from_its_own_folder_draws_as_the_pipeline(sd15):
    parts = {
        "generator_checkpoint_path": sd15 / "unet",
        "autoencoder_checkpoint_path": sd15 / "vae",
        "text_encoder_checkpoint_path": sd15 / "text_encoder",
    }
    assert_close(drawn(**parts), drawn(generator_checkpoint_path=sd15), rtol=0, atol=1e-5)


def test_several_seeds_and_a_negative_prompt_for_each_prompt(sd15):
    settings = {"generator_checkpoint_path": sd15, "seeds": [1, 2]}
    together = drawn(prompts=["a dog", "cats"], negative_prompts=["bad", "ugly"], **settings)
    apart = [
        drawn(prompts=[prompt], negative_prompt=negative, **settings)
        for prompt, negative in (("a dog", "bad"), ("cats", "ugly"))
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)
    assert (together - drawn(prompts=["a dog", "cats"], **settings)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("form", ["diffusers", pytest.param("kohya", marks=pytest.mark.slow)])
def test_two_loras_with_strengths_draw_as_in_diffusers(sd15, tmp_path, form):
    config = config_of(generator_checkpoint_path=sd15)
    unet, text = build.unet(config), build.text_encoders(config).encoders[0].model
    networks = {"unet": unet, "text_encoder": text}
    loras = {
        "one": {"unet": lora_on(unet, "to_q", 1), "text_encoder": lora_on(text, "out_proj", 2)},
        "two": {"unet": lora_on(unet, "to_v", 3)},
    }
    strengths = {"one": 0.05, "two": -0.1}
    pipe = diffusers.DiffusionPipeline.from_pretrained(sd15, local_files_only=True)
    for name, lora in loras.items():
        write_loras(lora, tmp_path / f"{name}.safetensors", form, networks)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(list(strengths), list(strengths.values()))
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip
    expected = pipe(
        "a red dog", height=64, width=64, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
        latents=SampleRandom([0]).normal("initial noise", 4, 8, 8),
    ).images  # fmt: skip
    files = [f"{tmp_path / name}.safetensors:{strength}" for name, strength in strengths.items()]
    found = drawn(generator_checkpoint_path=sd15, lora=files)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    plain, one = drawn(generator_checkpoint_path=sd15), drawn(generator_checkpoint_path=sd15, lora=files[:1])
    assert min((found - other).abs().max() for other in (plain, one)) > 1e-3


def test_a_lora_of_sdxl_on_stable_diffusion_is_refused(sd15, tmp_path):
    sdxl = config_of(generator_checkpoint_path=write_sdxl(tmp_path / "sdxl"))
    unet = build.unet(sdxl)
    write_loras({"unet": lora_on(unet, "to_k", 1)}, tmp_path / "xl.safetensors", "diffusers", {"unet": unet})
    with pytest.raises(
        UserError, match=r"is a LoRA of SDXL, and the networks here are Stable Diffusion 1\.5: name a LoRA"
    ):
        open_loras([str(tmp_path / "xl.safetensors")], config_of(generator_checkpoint_path=sd15))


@pytest.mark.integration
def test_a_run_is_drawn_from_by_its_average_and_with_the_parts_it_began_with(sd15, tmp_path, monkeypatch):
    case = importlib.import_module("train.train_sd").TrainSd
    settings = tiny_settings(
        tmp_path, write_shard(tmp_path / "a.tar", 4, (64, 64)), updates=2, save_every=2, image_size=64,
        ema_start_iters=1, ema_beta=0.5, lr=1e-2, sample_steps=1, sample_count=1, generator_checkpoint_path=str(sd15),
    )  # fmt: skip
    settings = {key: value for key, value in settings.items() if key in case.Config.model_fields}
    assert case(make_config(case.Config, settings)).run() == 0
    run = tmp_path / settings["experiment_id"]
    average = shutil.copytree(sd15, tmp_path / "average")
    tensors = load_file(run / "generator_ema.safetensors")
    save_file(tensors, average / "unet" / "diffusion_pytorch_model.safetensors")
    expected = drawn(generator_checkpoint_path=average)
    torch.testing.assert_close(drawn(run=[run]), expected, atol=1e-5, rtol=0)
    assert (drawn(run=[run], use_ema=False) - expected).abs().max() > 1e-4
    kept = {"autoencoder_checkpoint_path": sd15, "text_encoder_checkpoint_path": sd15}
    torch.testing.assert_close(drawn(generator_checkpoint_path=run, **kept), expected, atol=1e-5, rtol=0)

    given = [f"run={run}", "size=[64, 64]", "steps=2", "prompts=a dog", f"output_path={tmp_path / 'drawn'}"]
    monkeypatch.setattr(sys, "argv", ["text_to_image.py", *given])
    importlib.import_module("inference.text_to_image").main()
    assert (tmp_path / "drawn" / "0000_a_dog_0.png").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": -1}, "guidance"),
        ({"sampler": "eulr"}, "sampler"),
        ({"strength": 0.5}, "strength says how far to go away from a picture: give init_image too"),
        ({"init_image": "gone.png"}, "init_image: .*gone.png does not exist"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompts: 2 for 1 prompts; give one for each"),
        ({"negative_prompts": ["a"], "negative_prompt": "b"}, "give one of the two"),
        ({"negative_prompt": "b", "guidance": 1}, "guidance: 1.0 computes no guidance"),
        ({"crop": [1, 2]}, "original_size, crop: only SDXL is told sizes, not sd15"),
        ({"generator_checkpoint_path": None}, "no weights of the U-Net: give run or generator_checkpoint_path"),
    ],
)
def test_impossible_settings_are_refused(sd15, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**{"generator_checkpoint_path": sd15} | settings)


@pytest.mark.parametrize("strength", [0, 0.3])
def test_a_strength_that_leaves_no_step_is_refused_before_weights_are_read(sd15, tmp_path, strength):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    given = {"generator_checkpoint_path": sd15, "lora": ["gone.safetensors"], "init_image": tmp_path / "photo.png"}
    config = config_of(**given, strength=strength, steps=3)
    with pytest.raises(UserError, match=f"strength {float(strength)} leaves none of 3 steps; write a larger strength"):
        StableDiffusionTextToImage(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"size": [64, 100]},
            r"size: 64 x 100 px \(height x width\); sides have to be multiples of 8 px, such as \[64, 9",
        ),
        ({"karras": True, "sampler": "pndm"}, "karras: pndm steps along whole timesteps"),
        ({"steps": 1001}, "sampling steps: 1001 of 1000 timesteps"),
        ({"clip_skip": 9}, "clip_skip 9 of 3 layers; write a number from 1 to 3"),
        ({"lora": ["gone.safetensors"]}, "there is no LoRA file gone.safetensors"),
    ],
)
def test_what_the_networks_cannot_do_is_refused(sd15, settings, message):
    with pytest.raises(UserError, match=message):
        drawn(generator_checkpoint_path=sd15, **settings)
