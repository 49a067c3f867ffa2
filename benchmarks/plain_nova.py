"""The update of NOVA with its published loss written out, around our network: for `benchmarks/plain_loops.py`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from families.common.features import lengths_name, stored
from families.common.training import DiffusionTraining
from modules.nova_decoder import patchify
from warpcore.data.reader import Batch

STEPS = 1000


def nova_use_case() -> type[DiffusionTraining]:
    from train.train_nova import TrainNova

    return TrainNova


def write_nova(version: str, folder: Path) -> dict[str, str]:
    """The autoencoder of a published `model_version`, with random weights; minis have theirs in the repository."""
    from diffusers import AutoencoderKL

    from families.nova.autoencoder import PUBLISHED_PICTURES
    from families.nova.versions import VERSIONS
    from modules.open_sora_plan_vae import DOWN, OpenSoraPlanAutoencoder

    if version.startswith("mini"):
        return {}
    vae = folder / "vae"
    if VERSIONS[version].draws_clips:
        vae.mkdir()
        save_file(OpenSoraPlanAutoencoder().state_dict(), vae / "diffusion_pytorch_model.safetensors")
        (vae / "config.json").write_text(json.dumps({"down_block_types": list(DOWN)}), encoding="utf-8")
    else:
        AutoencoderKL(**PUBLISHED_PICTURES).save_pretrained(vae)
    return {"autoencoder_checkpoint_path": str(vae)}


def nova_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The published loss: hidden tokens, each noised several times, at times of their own (arXiv:2412.14169)."""
    from diffusers import DDPMScheduler

    network, repeats = copy.deepcopy(run.networks["generator"]), run.config.loss_repeat
    moments, scale, device = stored(batch, "moments"), run.latents[0], run.device
    told = {"text": stored(batch, "text"), "lengths": stored(batch, lengths_name("text"))}
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.to(device)

    def noised(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with noise, their times, and what is to be predicted of them."""
        if run.config.target == "epsilon":
            times = torch.randint(0, STEPS, x0.shape[:2], device=device)
            alpha = alphas[times][..., None]
            return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, times, noise
        share = 1 - (torch.randn(x0.shape[:2], device=device).sigmoid() * STEPS).long() / STEPS
        return share[..., None] * noise + (1 - share[..., None]) * x0, STEPS * share, noise - x0

    def loss() -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = scale.apply(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        patches = patchify(latents.transpose(1, 2).flatten(0, 1), network.patch)
        pictures, tokens = patches.shape[:2]
        ratio = nn.init.trunc_normal_(torch.empty(()), 1.0, 0.25, 0.7, 1.0).item()
        visible = torch.rand(pictures, tokens, device=device).argsort(dim=1)[:, : round((1 - ratio) * tokens)]
        hidden = torch.ones(pictures, tokens, dtype=torch.bool, device=device).scatter(1, visible, False)
        x0 = patches.repeat(repeats, 1, 1)
        x, times, target = noised(x0, torch.randn_like(x0))
        predicted = network(latents, hidden, visible, x, times, **told)
        errors = (predicted.float() - target).square().mean(dim=-1).unflatten(0, (repeats, -1)).mean(dim=0) * hidden
        errors, hidden = (one.view(*latents.shape[:1], latents.shape[2], tokens) for one in (errors, hidden))
        parts = [slice(0, 1), slice(1, None)][: latents.shape[2]]
        return sum(errors[:, part].sum() / hidden[:, part].sum() for part in parts)

    return network, loss
