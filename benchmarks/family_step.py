"""How fast an update of Stable Diffusion is, beside diffusers' U-Net in the plain loop of its text-to-image example.

    python3 benchmarks/sd_step.py                  # on a GPU the published sizes, else a tiny and a small U-Net
    python3 benchmarks/sd_step.py --cases small --turns 5 --updates 10

Three contenders take turns in one process: the plain loop and train/train_sd.py, both on the same features in memory,
and train/train_sd.py on pictures, which its autoencoder and text encoders see in every update. The plain loop is that
of diffusers' `examples/text_to_image`: DDPMScheduler, mean squared error, `clip_grad_norm_`, `torch.optim.AdamW`. The
networks have random weights; those of the U-Net are the same for both.
"""

import warpcore.openmp
import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from families.common.features import stored_name
from families.stable_diffusion.versions import VERSIONS
from train.train_sd import TrainSd
from warpcore import optim
from warpcore.config import make_config
from warpcore.data.reader import Batch
from warpcore.rehearsal import made_up_batch

PLAIN_LOOP, FROM_FEATURES, FROM_PICTURES = "diffusers, plain loop", "ours, from features", "ours, from pictures"
SMALL = {
    "block_out_channels": [128, 256, 256], "layers_per_block": 2, "attention_head_dim": 8, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
"""What a small U-Net has other than the mini's."""


@dataclass(frozen=True)
class Case:
    """A U-Net, the size of its pictures and a batch."""

    name: str
    version: str
    image_px: int
    batch: int
    changes: dict | None = None
    """Other constructor numbers of the U-Net."""

    def __str__(self) -> str:
        return f"{self.name} {self.image_px} px, batch {self.batch}"


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return [Case("SD 1.5", "sd15", 512, 8), Case("SDXL", "sdxl", 1024, 2)]
    return [Case("tiny", "mini", 128, 16), Case("small", "mini", 512, 2, SMALL)]


def write_networks(case: Case, folder: Path) -> dict[str, str]:
    """Random networks of a case; the keys of training that name them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    version = VERSIONS[case.version]
    torch.manual_seed(0)
    UNet2DConditionModel(**version.unet | (case.changes or {})).save_pretrained(folder / "unet")
    if case.version == "mini":
        return {"generator_checkpoint_path": str(folder / "unet")}
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    AutoencoderKL(**version.autoencoder).save_pretrained(folder / "vae")
    for number, config in enumerate(version.text):
        kind = CLIPTextModelWithProjection if "Projection" in config["architectures"][0] else CLIPTextModel
        kind(CLIPTextConfig(**config)).save_pretrained(folder / ("text_encoder_2" if number else "text_encoder"))
    name = "StableDiffusionXLPipeline" if version.sees_sizes else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
    return {"generator_checkpoint_path": str(folder)}


def training(case: Case, device: torch.device, folder: Path) -> TrainSd:
    """train/train_sd.py with its networks."""
    keys = write_networks(case, folder)
    run = TrainSd(make_config(TrainSd.Config, keys | {
        "experiment_id": "step", "checkpoint_path": str(folder), "webdataset_path": str(folder), "updates": 1,
        "batch_size": case.batch, "image_size": case.image_px, "model_version": case.version, "device": device.type,
        "lr": 1e-5, "diffusion_target": "epsilon", "caption_dropout": 0.0, "optimizer": "adamw",
    }))  # fmt: skip
    run.update = 0
    run.make_networks()
    return run


def with_features(run: TrainSd, batch: Batch) -> Batch:
    """A batch as a cache gives it: features in place of pictures."""
    _, random = run.encoded(batch)
    with torch.no_grad():
        made = run.picture_features(batch, random) | run.text_conditions(batch.captions)
    stored = {stored_name(name): made[name] for name in run.features}
    return replace(batch, images=None, extra=batch.extra | stored)


def our_update(run: TrainSd, batch: Batch) -> Callable[[], None]:
    trained, never = list(run.parameters.values()), torch.zeros((), device=run.device)

    def update() -> None:
        run.forward(batch).loss.mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optim.step(run.optimizers, never)
        for parameter in trained:
            parameter.grad = None

    return update


def their_update(run: TrainSd, batch: Batch, folder: Path) -> Callable[[], None]:
    """diffusers' loop on the features of a batch."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(run.device).train()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    conditions = run.conditions(batch, run.encoded(batch)[1])
    text = conditions.pop("encoder_hidden_states")
    moments, scale = batch.extra[stored_name("moments")], run.latents[0]
    cast = torch.autocast("cuda", torch.bfloat16) if run.device.type == "cuda" else nullcontext()

    def update() -> None:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = scale.apply(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=run.device)
        with cast:
            predicted = network(
                scheduler.add_noise(latents, noise, times), times, text, added_cond_kwargs=conditions or None,
                return_dict=False,
            )[0]  # fmt: skip
            loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def measure(case: Case, device: torch.device, turns: int, updates: int) -> dict[str, float]:
    """Median seconds per update of each contender."""
    with tempfile.TemporaryDirectory(prefix="warpcore_sd_step_") as scratch:
        folder = Path(scratch)
        run = training(case, device, folder)
        pictures = made_up_batch(run, (case.image_px, case.image_px), case.batch).to(device)
        features = with_features(run, pictures)
        contenders = {
            PLAIN_LOOP: their_update(run, features, folder),
            FROM_FEATURES: our_update(run, features),
            FROM_PICTURES: our_update(run, pictures),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(turns + 1):  # the first one warms up
            for name, update in contenders.items():
                for _ in range(updates if turn else 1):
                    began = _now(device)
                    update()
                    seconds[name] += [_now(device) - began] if turn else []
        run.close()
    return {name: statistics.median(took) for name, took in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose names contain this text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5, help="of each turn")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians of "
          f"{options.turns} turns of {options.updates} updates\n")  # fmt: skip
    print("| case | contender | ms per update | beside the plain loop |\n|---|---|---|---|")
    for case in cases(device):
        if options.cases in str(case):
            for name, seconds in (took := measure(case, device, options.turns, options.updates)).items():
                print(f"| {case} | {name} | {seconds * 1000:.1f} | {took[PLAIN_LOOP] / seconds:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
