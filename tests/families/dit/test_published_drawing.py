"""Drawing through the networks of DiT and PixArt-alpha, beside the loops of the reference, recorded or written out."""

import math

import pytest
import torch
from torch import Tensor

from families.common.classes import label_tensors
from families.common.library_networks import adapt
from families.common.sampling import draw_latents
from families.dit.config import DitSettings
from families.dit.pixart_build import BLOCKS
from families.dit.pixart_conditions import MASK, TEXT, without_text
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_names import library_tensors
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.dit.pixart_versions import numbers
from tests.families.dit.pixart import golden_network as golden_pixart
from tests.golden import load_case, resolve, weights_of
from tests.modules.test_dit import golden_network as golden_dit
from tests.small_stdit import SmallSTDiT
from warpcore.diffusion.processes import discrete_process
from warpcore.random import SampleRandom

SEEDS, STEPS = [3, 11], 6


def ancestral(network, x: Tensor, told: dict, untold: dict, scale: float, channels: int | None) -> Tensor:
    """Ancestral sampling with a learned variance, as the notes of the case `iddpm_sampling` describe it."""
    kept = [round(i * 999 / (STEPS - 1)) for i in range(STEPS)]
    known = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[kept]
    before = torch.cat([torch.ones(1, dtype=torch.float64), known[:-1]])
    betas = 1 - known / before
    variances = betas * (1 - before) / (1 - known)
    variances[0] = variances[1]
    random, own = SampleRandom(SEEDS, "cpu"), x.shape[1]
    for step, i in enumerate(reversed(range(STEPS))):
        t = torch.full((len(x),), kept[i])
        made, empty = (network(x, t, **conditions) for conditions in (told, untold))
        guided = channels or own
        noise = torch.cat([empty[:, :guided] + scale * (made - empty)[:, :guided], made[:, guided:own]], dim=1)
        share = (made[:, own:] + 1) / 2
        log_variance = share * betas[i].log() + (1 - share) * variances[i].log()
        clean = (x - (1 - known[i]).sqrt() * noise) / known[i].sqrt()
        mean = (betas[i] * before[i].sqrt() * clean + (1 - before[i]) * (1 - betas[i]).sqrt() * x) / (1 - known[i])
        x = mean.float()
        if i:
            x = x + (0.5 * log_variance).exp().float() * random.normal(f"noise of step {step}", *x.shape[1:])
    return x


def drawn(network, x: Tensor, told: dict, untold: dict, sampler: str, scale: float, **others) -> Tensor:
    process = discrete_process("linear", learned_variance=True)
    return draw_latents(
        process, network, told, untold, x.shape[1:], SEEDS, sampler=sampler, guidance=scale, guidance_rescale=0.0,
        initial_noise=x, **{"steps": STEPS} | others,
    )  # fmt: skip


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.abs().max().item())


@torch.no_grad()
def test_dit_draws_with_its_learned_variance_and_three_guided_channels():
    network = golden_dit("dit_class_small")[0].eval()
    told, untold = ({"y": labels} for labels in label_tensors([2, 7], 10))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guided = DitSettings().guided_channels("iddpm")
    assert guided == 3
    found = drawn(network, x, told, untold, "iddpm", 4.0, guidance_channels=guided)
    close(found, ancestral(network, x, told, untold, 4.0, 3))
    assert not torch.allclose(found, drawn(network, x, told, untold, "iddpm", 4.0), rtol=0.01)


@torch.no_grad()
def test_pixart_draws_with_its_learned_variance_and_three_guided_channels():
    network, spec, tensors = golden_pixart("pixart_small")
    _, _, y = resolve(spec["calls"][0]["args"], tensors)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told = {TEXT: y.squeeze(1), MASK: torch.arange(y.shape[2]) < torch.tensor([[5], [y.shape[2]]])}
    untold = without_text(told, network.y_embedding, {})
    guided = PixartSettings().guided_channels("iddpm")
    assert guided == 3
    found = drawn(network, x, told, untold, "iddpm", 7.0, guidance_channels=guided)
    close(found, ancestral(network, x, told, untold, 7.0, 3))


@pytest.mark.parametrize("call", load_case("opensora/dpm_solver_sampling")[0]["calls"], ids=lambda call: call["name"])
@torch.no_grad()
def test_pixart_draws_by_dpm_solver_what_the_reference_drew(call):
    spec, tensors = load_case("opensora/dpm_solver_sampling")
    made = spec["constructor"]
    network = PixArtTransformer2DModel(made["model_max_length"], **numbers(
        made["num_heads"], made["hidden_size"] // made["num_heads"], made["depth"], made["caption_channels"],
        sample_size=made["input_size"][1],
    ))  # fmt: skip
    tables = {name: SmallSTDiT(spec).weights[name] for name in ("pos_embed", "pos_embed_temporal")}
    network.load_state_dict(library_tensors(weights_of(spec, tensors, computed=tables)), strict=True)
    network = adapt(network, BLOCKS).eval()
    given, expected = resolve(call["kwargs"], tensors), resolve(call["result"], tensors)["final"].squeeze(2)
    told = {TEXT: given["y"].squeeze(1), MASK: given["text_mask"].bool()}
    settings = call["scheduler"]
    found = drawn(
        network, given["z"].squeeze(2), told, without_text(told, network.y_embedding, {}), "dpm-solver",
        settings["cfg_scale"], steps=settings["num_sampling_steps"],
        guidance_channels=PixartSettings().guided_channels("dpm-solver"),
    )  # fmt: skip
    assert math.isfinite(found.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])
