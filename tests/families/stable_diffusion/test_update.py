"""One update is that of diffusers' text-to-image examples, written in plain PyTorch; one from a cache is the same."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from tests.caches import make_cache
from tests.families.stable_diffusion.test_train_sd import PIPELINES, settings_of, train
from tests.tiers import represented_by
from tests.warpcore.runs import read_metrics, write_shard
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
LR, EPS, BETAS = 0.01, 1e-2, (0.9, 0.999)
"""`EPS` keeps gradients of rounding size from steps of full size."""
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


class Recorded(TrainSd):
    """Keeps what the examples draw by chance: crops, captions, noise and timesteps."""

    def encode(self, batch, random):
        self.batch, self.random = batch, random
        return super().encode(batch, random)

    def denoising_loss(self, latents, random, predict, noise=None):
        self.noise = random.normal("noise", *latents.shape[1:])

        def recorded(noised, times):
            self.times = times
            return predict(noised, times)

        return super().denoising_loss(latents, random, recorded, noise)


def in_diffusers(folder: Path, version: str, run: Recorded) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and weights after the update of train_text_to_image.py or train_text_to_image_sdxl.py."""
    kind = diffusers.StableDiffusionPipeline if version == "sd15" else diffusers.StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    schedule = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet, captions = pipeline.unet.train(), list(run.batch.captions)

    def ids(tokenizer) -> Tensor:
        return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    with torch.no_grad():
        posterior = pipeline.vae.encode(run.batch.images / 127.5 - 1).latent_dist
        drawn = posterior.mean + posterior.std * run.random.normal("latent", *posterior.mean.shape[1:])
        latents = drawn * pipeline.vae.config.scaling_factor
        if version == "sd15":
            told = {"encoder_hidden_states": pipeline.text_encoder(ids(pipeline.tokenizer))[0]}
        else:
            first = pipeline.text_encoder(ids(pipeline.tokenizer), output_hidden_states=True)
            second = pipeline.text_encoder_2(ids(pipeline.tokenizer_2), output_hidden_states=True)
            numbers = [
                (*one[0].tolist(), *one[2].tolist(), *run.batch.images.shape[2:]) for one in run.batch.geometry.values
            ]
            told = {
                "encoder_hidden_states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
                "added_cond_kwargs": {"text_embeds": second[0], "time_ids": torch.tensor(numbers).float()},
            }
    noised = schedule.add_noise(latents, run.noise, run.times)
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, run.noise, run.times) if velocity else run.noise
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    loss = mse_loss(unet(noised, run.times, return_dict=False, **told)[0].float(), target.float())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item(), unet.state_dict()


@pytest.mark.parametrize(("version", "scheduler"), [
    ("sd15", {}), pytest.param("sd15", ZERO_SNR, marks=pytest.mark.slow), ("sdxl", {}),
])  # fmt: skip
def test_one_update_is_that_of_the_library_s_example(tmp_path, version, scheduler):
    pipeline = PIPELINES[version](tmp_path / "pipeline")
    config = pipeline / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    before = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    data = write_shard(tmp_path / "large" / "a.tar", 4, (80, 112))
    settings = settings_of(
        tmp_path, version, webdataset_path=str(data), caption_dropout=0.0, lr=LR, eps=EPS, betas=list(BETAS),
        weight_decay=0.0,
    )  # fmt: skip
    run = Recorded(make_config(TrainSd.Config, settings))
    assert run.run() == 0
    lines = read_metrics(settings)
    ours = load_file(tmp_path / settings["experiment_id"] / "generator.safetensors")
    loss, norm, theirs = in_diffusers(pipeline, version, run)
    assert lines[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    change = torch.cat([(theirs[name] - before[name]).flatten() for name in before])
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in before])
    assert difference.norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("version", represented_by("sdxl", of=PIPELINES))
def test_a_run_from_a_cache_has_the_losses_of_one_from_pictures(tmp_path, version):
    given = settings_of(
        tmp_path, version, latent="mean", updates=3, save_every=3, crop_mode="center", caption_dropout=0.5,
        webdataset_path=str(write_shard(tmp_path / "large" / "a.tar", 6, (80, 112))),
    )  # fmt: skip
    cache = make_cache("train_sd", given, tmp_path / "cache", "--dtype", "float32")
    from_pictures = train(given)
    from_cache = train(given | {"experiment_id": "cached", "webdataset_path": str(cache)})
    assert [line["loss"] for line in from_cache] == pytest.approx([line["loss"] for line in from_pictures], rel=1e-5)


def test_a_cache_of_text_encoders_with_another_config_is_refused(tmp_path):
    given = settings_of(tmp_path, "sd15")
    cache = make_cache("train_sd", given, tmp_path / "cache")
    config = tmp_path / "pipeline" / "text_encoder" / "config.json"
    assert '"quick_gelu"' in config.read_text()
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    with pytest.raises(UserError, match="the weights of the text network are"):
        TrainSd(make_config(TrainSd.Config, given | {"webdataset_path": str(cache)})).run()


def test_a_cache_of_another_autoencoder_with_the_same_shapes_is_refused(tmp_path):
    given = settings_of(tmp_path, "sd15")
    cache = make_cache("train_sd", given, tmp_path / "cache")
    weights = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="the weights of the autoencoder network are"):
        TrainSd(make_config(TrainSd.Config, given | {"webdataset_path": str(cache)})).run()
