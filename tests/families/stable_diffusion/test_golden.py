"""The small networks of the reference, and what its training function makes of micro-batches with recorded draws."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from families.common.autoencoders import Autoencoder
from families.common.library_networks import LibraryNetwork, adapt
from families.stable_diffusion.build import process
from families.stable_diffusion.config import SdSettings
from tests.families.stable_diffusion.tiny_t5_pipeline import texts_of
from tests.golden import load_case, resolve, weights_of
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.diffusion.loss_weights import loss_weight_for
from warpcore.gradients import clip_gradients, gradient_means, keep_largest, mean_groups, named_by
from warpcore.networks import block_names

UNETS = ("unet_sd15_small", "unet_sdxl_small")
TEXT = "encoder_hidden_states"


def unet(case: str) -> LibraryNetwork:
    spec, tensors = load_case(f"sd_t5/{case}")
    network = UNet2DConditionModel(**spec["constructor"])
    network.load_state_dict(weights_of(spec, tensors), strict=True)
    return adapt(network)


@pytest.mark.parametrize("case", UNETS)
@torch.no_grad()
def test_unets_of_both_layouts_predict_what_the_reference_does(case):
    spec, tensors = load_case(f"sd_t5/{case}")
    network = unet(case).eval()
    for call in spec["calls"]:
        if call["method"] != "__call__":
            (times,) = resolve(call["args"], tensors)
            expected = resolve(call["result"], tensors)
            torch.testing.assert_close(network.time_proj(times), expected, rtol=0, atol=1e-6)
            continue
        latents, times, text = resolve(call["args"], tensors)
        others = resolve(call.get("kwargs", {}), tensors).get("added_cond_kwargs", {})
        found = network(latents, times, **{TEXT: text}, **others)
        expected, atol = resolve(call["result"], tensors), call["result_stats"]["suggested_atol"]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@torch.no_grad()
def test_the_autoencoder_makes_the_moments_and_pictures_of_the_reference():
    spec, tensors = load_case("sd_t5/vae_small")
    ours = Autoencoder(spec["constructor"])
    ours.model.load_state_dict(weights_of(spec, tensors), strict=True)
    for call in spec["calls"]:
        (given,) = resolve(call["args"], tensors)
        expected, atol = resolve(call["result"], tensors), call["result_stats"]["suggested_atol"]
        if call["method"] == "encode":  # its pictures are not of whole grey levels, as those of `moments` are
            posterior = ours.model.encode(given).latent_dist
            found = torch.cat([posterior.mean, posterior.logvar], dim=1)
        else:  # ours takes scaled latents, and gives pictures in [0, 1]
            found, expected = ours.decode(ours.scale.apply(given)), (expected / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def micro_batch(record: dict, tensors: dict[str, Tensor], scale: float, length: int | None) -> dict[str, Tensor]:
    """length: to which texts of T5 are cut, or filled up with zeros that nothing masks."""
    given = resolve(record, tensors)
    if length is not None:
        given["embeddings"] = list(texts_of(given["embeddings"], length).hidden)
    return {name: torch.stack(given[name]) if isinstance(given[name], list) else given[name] for name in given} | {
        "latents": torch.stack(given["latents"]) * scale
    }


STEPS = [call["name"] for call in load_case("sd_t5/training_step")[0]["calls"]]
NOT_OURS = "accumulate_2_scaled"
"""Divides the loss by the number of micro-batches a second time, which no key here does."""
THINNED = "attn1|attn2|transformer_blocks|mid_block"


@pytest.mark.parametrize("name", [name for name in STEPS if name != NOT_OURS])
def test_losses_and_gradients_are_those_of_the_reference(name):
    spec, tensors = load_case("sd_t5/training_step")
    call = next(call for call in spec["calls"] if call["name"] == name)
    options, expected = call["options"], call["result"]
    flow = {"diffusion_target": "rectified_flows"} if name == "flow_match" else {}
    config = {"experiment_id": "x", "checkpoint_path": "x", "updates": 1, "batch_size": 1, "webdataset_path": "x"}
    run = TrainSd(make_config(TrainSd.Config, config | {"image_size": 64} | flow))
    assert run.config.min_sigma == options.get("min_sigma", 1e-5)
    diffusion = run.make_diffusion("min_snr" if options.get("use_snr") else "constant", convert_weight=True)
    if "noise_gamma" in options:
        diffusion.loss_weight = loss_weight_for("min_snr", "epsilon", max_snr=options["noise_gamma"])
    network, losses = unet("unet_sd15_small").train(), []
    named = dict(network.named_parameters())
    thinned = named_by({key: p for key, p in named.items() if p.dim() >= 2}, THINNED, "gradient_topk_pattern")
    batches = [
        micro_batch(record, tensors, options["latent_scaling"], options.get("force_toklen"))
        for record in call["micro_batches"]
    ]
    for batch in batches:
        times = {"t": batch["timesteps"]} if "timesteps" in batch else {"uniform": 1 - batch["uniform"].flatten()}
        diffused = diffusion.diffuse(batch["latents"], batch["noise"], **times)
        prediction = network(diffused.noised, diffused.noise_cond, **{TEXT: batch["embeddings"]})
        found = diffusion.loss(diffused, prediction)
        losses.append((found.raw.mean().item(), found.loss.mean().item()))
        (found.loss.mean() / len(batches)).backward()
        if "gradient_topk" in options:
            keep_largest(list(thinned.values()), options["gradient_topk"])
    raw, weighted = (sum(values) / len(batches) for values in zip(*losses, strict=True))
    logged, tolerance = expected["logged"], call["suggested_rtol"]
    assert raw == pytest.approx(logged["train/loss_raw"], rel=tolerance)
    assert weighted == pytest.approx(logged.get("train/loss_snr", raw), rel=tolerance)
    blocks = [key.removeprefix("net.") for key in block_names({"net": network})]
    means = gradient_means(mean_groups(named, {"qk_grads_av": r"\.to_[qk]\.weight$"}, blocks))
    total = means.pop("qk_grads_av").item()
    assert total == pytest.approx(logged["train/qk_grads_av"], rel=tolerance)
    assert len(means) == len([block for block in blocks if block.split(".")[-2] == "transformer_blocks"])
    assert sum(means.values()).item() == pytest.approx(total, rel=1e-6)
    clip = options.get("gradient_clip", 1.0)
    norm = clip_gradients(network.parameters(), clip if clip > 0 else None)
    assert norm.item() == pytest.approx(logged["train/grad_norm"], rel=tolerance)
    for parameter, gradient in resolve(expected["gradients_at_the_step"], tensors).items():
        found = network.get_parameter(parameter).grad
        torch.testing.assert_close(found, gradient, rtol=tolerance, atol=call["suggested_atol"])


def test_noise_is_added_in_float32_whatever_the_network_computes_in():
    """The reference rounds its table to bfloat16: at times 0 and 1 it adds no noise at all."""
    _, tensors = load_case("sd_t5/noise_schedules")
    clean = tensors["out.scaled_linear.alphas_cumprod"].double()[:8, None]
    latents, noise = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        diffused = process(SdSettings()).diffuse(latents, noise, t=torch.arange(8))
    expected = clean.sqrt() * latents + (1 - clean).sqrt() * noise
    torch.testing.assert_close(diffused.noised.double(), expected, rtol=0, atol=1e-5)
    assert diffused.noised.dtype == torch.float32


@pytest.mark.parametrize(
    ("kept", "given", "last", "min_sigma"),
    [
        ({}, {}, 1000, 0),
        ({}, {"min_sigma": 1e-5}, 1000, 1e-5),
        (TrainSd.conventions | {"keys": ["min_sigma"]}, {}, 999, 1e-5),
    ],
)
def test_a_run_keeps_the_times_of_flows_that_it_began_with(kept, given, last, min_sigma):
    run = TrainSd(make_config(TrainSd.Config, {
        "experiment_id": "x", "checkpoint_path": "x", "updates": 1, "batch_size": 1, "webdataset_path": "x",
        "image_size": 64, "diffusion_target": "rectified_flows", "sample_sampler": "euler",
    } | given))  # fmt: skip
    run.begin({"about": {"diffusion_target": "rectified_flows"}, "kept": dict(kept)})
    assert run.diffusion.noise_cond.steps == last
    assert run.diffusion.schedule.min_sigma == min_sigma
    assert len(run.older) == (min_sigma == 0)
