"""Drawings equal those of diffusers' pipelines from the same folder and the same noise."""

import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from torch import Tensor

from families.common.pictures import read_picture, to_pictures
from families.stable_diffusion.text_to_image import SdTextToImageConfig, StableDiffusionTextToImage
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl
from warpcore.config import make_config
from warpcore.pictures import save_png
from warpcore.random import SampleRandom

PROMPTS, NEGATIVE, SEEDS = ["a red dog", "cats"], "bad", [3, 4]
STEPS = 6
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The scheduler of each sampler, with the settings of the published pipelines."""


def among(name: str, slow: bool):
    """A parameter; those that others represent are slow."""
    return pytest.param(name, marks=pytest.mark.slow) if slow else name


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return write_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@cache
def pipeline(folder: Path) -> diffusers.DiffusionPipeline:
    opened = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    return opened


def noise(size: int = 8) -> Tensor:
    """The noise of two pictures."""
    return SampleRandom(SEEDS).normal("initial noise", 4, size, size)


def drawn_here(folder: Path, **settings) -> Tensor:
    common = {"generator_checkpoint_path": folder, "size": [64, 64], "steps": STEPS, "prompts": PROMPTS}
    task = StableDiffusionTextToImage(make_config(StableDiffusionTextToImage.Config, common | settings))
    prompts = settings.get("prompts", PROMPTS)
    return torch.stack(task.draw(prompts, SEEDS[: len(prompts)]).pictures)


def drawn_there(folder: Path, sampler: str, karras: bool = False, **settings) -> Tensor:
    pipe = pipeline(folder)
    kind, own = SCHEDULERS[sampler]
    own = own | {"use_karras_sigmas": True} if karras else own
    pipe.scheduler = getattr(diffusers, kind)(**SCHEDULE, **own)
    common = {"prompt": PROMPTS, "height": 64, "width": 64, "num_inference_steps": STEPS, "latents": noise()}
    return pipe(**common | settings, output_type="pt").images


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", [among(name, name in ("heun", "ddim", "unipc")) for name in SCHEDULERS])
def test_stable_diffusion_with_each_sampler(sd15, sampler):
    found = drawn_here(sd15, sampler=sampler, guidance=7.5, negative_prompt=NEGATIVE)
    expected = drawn_there(sd15, sampler, guidance_scale=7.5, negative_prompt=[NEGATIVE] * 2)
    assert_same(found, expected)


@pytest.mark.parametrize("sampler", [among("euler", slow=True), "dpmpp_2m"])
def test_karras_sigmas(sd15, sampler):
    found = drawn_here(sd15, sampler=sampler, karras=True, guidance=3)
    assert_same(found, drawn_there(sd15, sampler, karras=True, guidance_scale=3))
    assert (found - drawn_here(sd15, sampler=sampler, guidance=3)).abs().max() > 1e-2


def test_no_guidance_rescaled_guidance_and_skipped_layers(sd15):
    plain, guided = drawn_here(sd15, guidance=1), drawn_here(sd15, guidance=7.5)
    assert_same(plain, drawn_there(sd15, "pndm", guidance_scale=1.0))
    rescaled = drawn_here(sd15, guidance=7.5, guidance_rescale=0.7)
    assert_same(rescaled, drawn_there(sd15, "pndm", guidance_scale=7.5, guidance_rescale=0.7))
    encoder = pipeline(sd15).text_encoder
    encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)  # transformers 5 has it no longer
    skipped = drawn_here(sd15, guidance=7.5, clip_skip=2)
    with torch.no_grad():  # of negative prompts diffusers skips nothing, unlike the programs that users know
        negative, _ = pipeline(sd15).encode_prompt([""] * 2, "cpu", 1, False, clip_skip=1)
    expected = drawn_there(sd15, "pndm", guidance_scale=7.5, clip_skip=1, negative_prompt_embeds=negative)
    assert_same(skipped, expected)
    different = [(one - guided).abs().max() > 1e-3 for one in (plain, rescaled, skipped)]
    assert all(different)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_sdxl(sdxl, negative):
    """Without a negative prompt, guidance leads away from zeros (`force_zeros_for_empty_prompt`)."""
    found = drawn_here(sdxl, guidance=5, negative_prompt=negative or "")
    expected = drawn_there(sdxl, "euler", guidance_scale=5.0, negative_prompt=negative and [negative] * 2)
    assert_same(found, expected)


def test_the_sizes_and_the_crop_of_sdxl(sdxl):
    found = drawn_here(sdxl, guidance=5, size=[64, 128], original_size=[40, 50], crop=[8, 16])
    latents = SampleRandom(SEEDS).normal("initial noise", 4, 8, 16)
    expected = drawn_there(
        sdxl, "euler", guidance_scale=5.0, height=64, width=128, latents=latents, original_size=(40, 50),
        crops_coords_top_left=(8, 16),
    )  # fmt: skip
    assert_same(found, expected)
    assert (found - drawn_here(sdxl, guidance=5, size=[64, 128])).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", [among("ddim", slow=True), "euler", among("dpmpp_2m", slow=True)])
def test_a_picture_to_start_from(sd15, tmp_path, monkeypatch, sampler):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    save_png(tmp_path / "start.png", to_pictures(picture[None])[0])
    settings = {"guidance": 7.5, "sampler": sampler, "init_image": tmp_path / "start.png", "strength": 0.6}
    found = drawn_here(sd15, **settings)

    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipeline(sd15).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    kind, own = SCHEDULERS[sampler]
    pipe.scheduler = getattr(diffusers, kind)(**SCHEDULE, **own)
    pixels = read_picture(tmp_path / "start.png")[None] * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    monkeypatch.setattr(img2img, "randn_tensor", lambda *_, **__: noise())
    expected = pipe(
        PROMPTS, latents.expand(2, -1, -1, -1), strength=0.6, num_inference_steps=STEPS, guidance_scale=7.5,
        output_type="pt",
    ).images  # fmt: skip
    assert_same(found, expected)
    assert (found - drawn_here(sd15, guidance=7.5, sampler=sampler)).abs().max() > 1e-2


def test_a_network_of_v_with_zero_terminal_snr_is_drawn_as_its_scheduler_says(sd15, tmp_path):
    folder = shutil.copytree(sd15, tmp_path / "v")
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(**SCHEDULE | settings, clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    found = drawn_here(folder, guidance=7.5, guidance_rescale=0.7, steps=5)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, scheduler=scheduler)
    expected = pipe(
        PROMPTS, height=64, width=64, num_inference_steps=5, guidance_scale=7.5, guidance_rescale=0.7, latents=noise(),
        output_type="pt",
    ).images  # fmt: skip
    assert_same(found, expected)


def test_a_straight_flow_is_drawn_by_euler_whatever_a_config_says_of_its_last_timestep():
    settings = {
        "prompts": ["a"],
        "diffusion_target": "rectified_flows",
        "zero_terminal_snr": True,
        "model_version": "mini",
    }
    drawing = StableDiffusionTextToImage(SdTextToImageConfig.model_construct(**settings))
    assert drawing.sampler == "euler"
