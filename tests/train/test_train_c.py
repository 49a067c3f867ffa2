"""Stage C's training, against plain PyTorch on diffusers' network, and as a run that is killed and goes on."""

import math

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

from tests.golden import load_case, weights_of
from tests.warpcore.runs import load_weights, numbers, read_metrics
from train.train_c import TrainStageC
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.random import SampleRandom

pytestmark = pytest.mark.integration


def diffusers_network(constructor: dict) -> StableCascadeUNet:
    blocks = constructor["blocks"]
    return StableCascadeUNet(
        in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1,
        conditioning_dim=constructor["c_cond"], block_out_channels=tuple(constructor["c_hidden"]),
        num_attention_heads=tuple(constructor["nhead"]), down_num_layers_per_block=tuple(blocks[0]),
        up_num_layers_per_block=tuple(blocks[1]), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=48, clip_text_pooled_in_channels=40, clip_image_in_channels=24, clip_seq=4,
        kernel_size=3, dropout=(0.0, 0.0), self_attn=True, timestep_conditioning_type=("sca", "crp"),
        switch_level=(False,),
    )  # fmt: skip


def test_an_update_equals_plain_torch_on_diffusers_network(small_cascade):
    seen = {}

    def keep_the_first(_, args):  # the pictures that are drawn after the update come later
        seen.setdefault("r", args[1])

    class Recorded(TrainStageC):
        def build(self):
            networks = super().build()
            networks["generator"].register_forward_pre_hook(keep_the_first)
            return networks

        def encode(self, batch, random):
            latents, conditions = super().encode(batch, random)
            seen.update(seeds=batch.seeds, latents=latents.clone(), conditions=dict(conditions))
            return latents, conditions

    assert Recorded(make_config(TrainStageC.Config, small_cascade)).run() == 0
    ours = load_weights(small_cascade)

    spec, tensors = load_case("stage_c_small")
    network = diffusers_network(spec["constructor"])
    start_weights = convert_stable_cascade_unet_single_file_to_diffusers(weights_of(spec, tensors))
    network.load_state_dict(start_weights)
    x0, random = seen["latents"], SampleRandom(seen["seeds"])
    # Published Stage C drew its times with this small push towards noise.
    t, noise = (1.001 - random.uniform("timestep")).clamp(max=1), random.normal("noise", *x0.shape[1:])
    # The cosine schedule (arXiv:2102.09672, eq. 17) with s = 0.008 and alpha-bar within [0.0001, 0.9999].
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alpha_bar = alpha_bar.clamp(0.0001, 0.9999)[:, None, None, None]
    noised = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    # The network is told the time at which the unclamped schedule has this noise.
    cosine = (alpha_bar.flatten().sqrt() * math.cos(0.008 / 1.008 * math.pi / 2)).acos()
    r = cosine / (math.pi / 2) * 1.008 - 0.008
    # The network sees sines of 10,000 r, so that even r's last bit shows: compare it, then go on with the same bits.
    torch.testing.assert_close(seen["r"], r, rtol=0, atol=2e-6)
    r = seen["r"]
    predicted = network(
        noised, r, clip_text_pooled=seen["conditions"]["clip_text_pooled"], clip_text=seen["conditions"]["clip_text"],
        clip_img=seen["conditions"]["clip_img"], return_dict=False,
    )[0]  # fmt: skip
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    raw = (predicted - noise).square().mean(dim=(1, 2, 3))
    loss = (raw / (1 + snr)).mean()  # P2 weights, k = gamma = 1
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.001, betas=(0.9, 0.95), eps=1e-7).step()

    line = read_metrics(small_cascade)[0]
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    converted = convert_stable_cascade_unet_single_file_to_diffusers(ours)
    moved = 0
    for name, parameter in network.state_dict().items():
        torch.testing.assert_close(converted[name], parameter, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, (parameter - start_weights[name]).abs().max().item())
    assert moved > 9e-4


@pytest.mark.bits
def test_a_run_goes_on_with_its_adaptive_weights_average_and_conditions(small_cascade):
    settings = small_cascade | {
        "adaptive_loss_weight": True, "ema_start_iters": 1, "ema_beta": 0.5, "validation_samples": 2, "updates": 6,
        "log_every": 1, "save_every": 2, "offset_noise": 0.1, "sample_steps": 2, "activation_checkpointing": 3,
    }  # fmt: skip
    whole = settings | {"experiment_id": "whole"}
    runs = [TrainStageC(make_config(TrainStageC.Config, one)) for one in (whole, settings | {"updates": 4}, settings)]
    assert [run.run() for run in runs] == [0, 0, 0]
    uninterrupted, _, resumed = (run.diffusion.loss_weight.bucket_losses for run in runs)
    assert torch.equal(resumed, uninterrupted)
    assert 1 <= (resumed != 1).sum() <= 6 * 4  # each sample of six updates moved its bucket
    assert numbers(read_metrics(settings)) == numbers(read_metrics(whole))
    assert len(read_metrics(settings)) == 6


def test_weights_of_another_network_and_missing_weights_are_named(small_cascade, tmp_path):
    def refusal(**changes) -> str:
        with pytest.raises(UserError) as error:
            TrainStageC(make_config(TrainStageC.Config, small_cascade | changes)).run()
        return str(error.value)

    message = refusal(generator_checkpoint_path=str(tmp_path / "previewer.safetensors"))
    assert "generator_checkpoint_path" in message
    assert "made for another network" in message
    message = refusal(effnet_checkpoint_path="nowhere.safetensors")
    assert "nowhere.safetensors does not exist" in message
    assert "models/download.py" in message
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    assert "cannot be read as weights" in refusal(previewer_checkpoint_path=str(tmp_path / "broken.safetensors"))
