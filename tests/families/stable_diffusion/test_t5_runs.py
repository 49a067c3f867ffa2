"""Stable Diffusion with T5: trained from caches without T5 in memory, drawn, exported, and trained further."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from families.stable_diffusion import build
from families.stable_diffusion.components import find_component
from families.stable_diffusion.diffusers_folder import scheduler
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from tests.caches import make_cache
from tests.families.stable_diffusion.test_exports import export as export
from tests.families.stable_diffusion.test_text_to_image import NEGATIVE, PROMPTS, SEEDS, STEPS, drawn_here, noise
from tests.families.stable_diffusion.test_train_sd import settings_of, train
from tests.families.stable_diffusion.tiny_pipeline import write_sdxl
from tests.families.stable_diffusion.tiny_t5_pipeline import write_t5_pipeline
from tests.warpcore.runs import read_metrics
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.config_files import read_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
T5 = {"text_model": "t5", "text_tokens": 12}


def of_run(tmp_path: Path, version: str, **changes) -> dict:
    if not (pipeline := tmp_path / "pipeline").exists():
        write_t5_pipeline(pipeline, version)
    return settings_of(tmp_path, version, latent="mean", crop_mode="center", **T5, **changes)


def beside(pipeline: Path) -> dict[str, str]:
    """The keys of what stands beside the U-Net."""
    return {f"{name}_checkpoint_path": str(pipeline) for name in ("autoencoder", "text_encoder", "text_projection")}


@pytest.mark.parametrize("version", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_run_from_caches_has_no_t5_and_its_folder_draws_the_same(tmp_path, export, version):
    given = of_run(tmp_path, version, sample_prompts=["a red dog"])
    caches = [
        str(make_cache("train_sd", given, tmp_path / kind, "--features", kind, "--dtype", "float32"))
        for kind in ("latents", "texts")
    ]
    from_pictures = train(given)
    built = set()

    class Watched(TrainSd):
        def build(self):
            networks = super().build()
            built.update(networks)
            return networks

    assert Watched(make_config(TrainSd.Config, given | {"experiment_id": "cached", "caches": caches})).run() == 0
    assert built == {"generator", "autoencoder"}
    assert read_metrics(given | {"experiment_id": "cached"})[0]["loss"] == pytest.approx(
        from_pictures[0]["loss"], rel=1e-5
    )
    folder = tmp_path / "cached"
    assert (folder / "samples" / "00000001.png").is_file()
    drawn = drawn_here(folder / "generator.safetensors", **beside(tmp_path / "pipeline"))
    keys = {"run": str(folder), "size": [64, 64], "steps": STEPS, "prompts": PROMPTS, "use_ema": False}
    task = StableDiffusionTextToImage(make_config(StableDiffusionTextToImage.Config, keys))
    torch.testing.assert_close(torch.stack(task.draw(PROMPTS, SEEDS).pictures), drawn, rtol=0, atol=1e-5)
    export("diffusers", folder, tmp_path / "exported", "use_ema=false")
    torch.testing.assert_close(drawn_here(tmp_path / "exported"), drawn, rtol=0, atol=1e-5)
    assert not torch.allclose(drawn_here(tmp_path / "pipeline"), drawn, atol=1e-3)
    with pytest.raises(UserError, match="T5 is not part of checkpoints in one file"):
        export("single-file", folder, tmp_path / "one.safetensors")
    export("single-file", folder, tmp_path / "one.safetensors", "only_unet=true", "use_ema=false")
    found = find_component(tmp_path / "one.safetensors", "unet", "x")
    assert (found.text_model, found.text_tokens) == ("t5", 12)
    parts = beside(tmp_path / "pipeline")
    torch.testing.assert_close(drawn_here(tmp_path / "one.safetensors", **parts), drawn, rtol=0, atol=1e-5)
    export("diffusers", folder, tmp_path / "unet", "only_unet=true", "use_ema=false")
    found = find_component(tmp_path / "unet", "unet", "x")
    assert (found.text_model, found.text_tokens) == ("t5", 12)
    torch.testing.assert_close(drawn_here(tmp_path / "unet", **parts), drawn, rtol=0, atol=1e-5)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert theirs.keys() == load_file(folder / "generator.safetensors").keys()
    del parts["text_projection_checkpoint_path"]
    for alone in ("one.safetensors", "unet"):
        with pytest.raises(UserError, match="was trained with a projection of T5's states"):
            drawn_here(tmp_path / alone, **parts)
    with pytest.raises(UserError, match="text_tokens is 12 in the cache, 13 here"):
        train(given | {"experiment_id": "longer", "caches": caches, "text_tokens": 13})


def test_drawings_are_those_of_the_library_s_pipeline_for_the_projected_states(tmp_path):
    folder = write_t5_pipeline(tmp_path, "sd15")
    settings = make_config(SdInferenceSettings, {"generator_checkpoint_path": str(folder)})
    texts = build.text_encoders(settings)
    parts = {"unet": build.unet(settings), "vae": build.autoencoder(settings).model}
    pipeline = StableDiffusionPipeline(
        **parts, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
        scheduler=scheduler(settings), requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = pipeline(
            prompt_embeds=texts(PROMPTS).hidden, negative_prompt_embeds=texts([NEGATIVE] * 2).hidden, height=64,
            width=64, num_inference_steps=6, latents=noise(), output_type="pt",
        ).images  # fmt: skip
    found = drawn_here(folder, negative_prompt=NEGATIVE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_another_projection_needs_another_cache_and_a_further_run_names_its_own(tmp_path):
    given = of_run(tmp_path, "sd15")
    texts = str(make_cache("train_sd", given, tmp_path / "texts", "--features", "texts"))
    train(given)
    trained = tmp_path / given["experiment_id"] / "generator.safetensors"
    parts = beside(tmp_path / "pipeline")
    projection = {name: parts.pop(name) for name in ["text_projection_checkpoint_path"]}
    further = of_run(tmp_path, "sd15", experiment_id="further", generator_checkpoint_path=str(trained), **parts)
    with pytest.raises(UserError, match=r"trained with a projection.*text_projection_checkpoint_path"):
        train(further)
    named = further | projection | {"caches": [texts]}
    train(named)
    layer = tmp_path / "pipeline" / "t5_projection" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(layer).items()}, layer)
    with pytest.raises(UserError, match="the weights of the text network are"):
        train(named | {"experiment_id": "other"})


@pytest.mark.slow
def test_with_another_autoencoder_first_the_ends_learn_then_all(tmp_path):
    """The groups of the shipped config; the other autoencoder is SDXL's, with a scale of its own."""
    ends, _ = read_config(ROOT / "configs" / "training" / "sd15_t5_sdxlvae_ends.yaml")
    other = {"autoencoder_checkpoint_path": str(write_sdxl(tmp_path / "sdxl") / "vae")}
    first = of_run(tmp_path, "sd15", updates=2, save_every=2, parameter_groups=ends["parameter_groups"], **other)
    train(first)
    run = tmp_path / first["experiment_id"]
    weights = [load_file(file) for file in (
        tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", run / "generator.safetensors"
    )]  # fmt: skip
    assert changed(*weights) == {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}
    parts = beside(tmp_path / "pipeline") | other | {"generator_checkpoint_path": str(run)}
    train(of_run(tmp_path, "sd15", experiment_id="all", **parts))
    weights.append(load_file(tmp_path / "all" / "generator.safetensors"))
    assert changed(*weights[1:]) == weights[0].keys()
    scale, _ = TrainSd(make_config(TrainSd.Config, first)).latents
    assert scale.apply(torch.ones(1, 4, 1, 1)).mean().item() == pytest.approx(0.13025)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The names of tensors that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}
