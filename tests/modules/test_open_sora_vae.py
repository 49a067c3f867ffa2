"""The autoencoder of Open-Sora 1.2 gives what the reference does, and its state is that of the published file."""

import pytest
import torch
from torch import Tensor, nn

from modules.open_sora_vae import SCALE, SHIFT, OpenSoraAutoencoder, TemporalAutoencoder
from tests.golden import load_case, load_manifest, resolve, weights_of

TEMPORAL, TEMPORAL_TENSORS = load_case("opensora/vae_temporal_small")
WHOLE, WHOLE_TENSORS = load_case("opensora/vae_pipeline_small")
TEMPORAL_CALLS = {call["name"]: call for call in TEMPORAL["calls"]}
WHOLE_CALLS = {call["name"]: call for call in WHOLE["calls"]}


def calls(of: dict[str, dict], method: str) -> list[str]:
    return [name for name, call in of.items() if call["method"] == method]


def temporal_network() -> TemporalAutoencoder:
    network = TemporalAutoencoder(**TEMPORAL["constructor"])
    network.load_state_dict(weights_of(TEMPORAL, TEMPORAL_TENSORS))
    return network


def whole_network(**other: int | None) -> OpenSoraAutoencoder:
    from diffusers import AutoencoderKL

    numbers = WHOLE["constructor"]
    sizes = {key: numbers[key] for key in ("micro_frame_size", "micro_batch_size")} | other
    temporal = TemporalAutoencoder(**numbers["vae_temporal"])
    network = OpenSoraAutoencoder(AutoencoderKL(**numbers["vae_2d"]), temporal, **sizes)
    computed = {"scale": network.scale, "shift": network.shift}
    network.load_state_dict(weights_of(WHOLE, WHOLE_TENSORS, computed))
    return network.eval()


@pytest.mark.parametrize("name", calls(TEMPORAL_CALLS, "encode"))
@torch.no_grad()
def test_latents_in_time_are_those_of_the_reference(name):
    call = TEMPORAL_CALLS[name]
    expected = resolve(call["result"], TEMPORAL_TENSORS)
    found = temporal_network().encode(*resolve(call["args"], TEMPORAL_TENSORS))
    both = torch.cat([expected["mean"], expected["logvar"]], dim=1)
    torch.testing.assert_close(found, both, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("name", calls(TEMPORAL_CALLS, "decode"))
@torch.no_grad()
def test_frames_of_latents_in_time_are_those_of_the_reference(name):
    call = TEMPORAL_CALLS[name]
    (latents,), frames = resolve(call["args"], TEMPORAL_TENSORS), call["kwargs"]["num_frames"]
    found = temporal_network().decode(latents, frames)
    expected = resolve(call["result"], TEMPORAL_TENSORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("name", calls(WHOLE_CALLS, "encode"))
@torch.no_grad()
def test_latents_of_clips_are_those_of_the_reference_with_its_noise(name):
    network, call = whole_network(), WHOLE_CALLS[name]
    (clips,), draws = resolve(call["args"], WHOLE_TENSORS), resolve(call["noise_draws"], WHOLE_TENSORS)
    of_frames = torch.cat([draw for draw in draws if draw.dim() == 4])[None].transpose(1, 2)
    in_time = torch.cat([draw for draw in draws if draw.dim() == 5], dim=2)
    moments = network.moments(clips, of_frames)
    found, expected = network.latents(moments, in_time), resolve(call["result"], WHOLE_TENSORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@pytest.mark.parametrize("name", calls(WHOLE_CALLS, "decode"))
@torch.no_grad()
def test_clips_of_latents_are_those_of_the_reference(name):
    call = WHOLE_CALLS[name]
    (latents,), frames = resolve(call["args"], WHOLE_TENSORS), call["kwargs"]["num_frames"]
    found, expected = whole_network().decode(latents, frames), resolve(call["result"], WHOLE_TENSORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@torch.no_grad()
def test_micro_batches_change_nothing_and_windows_know_nothing_of_each_other():
    clips = torch.rand(2, 3, 21, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    by_four, by_thirty = whole_network(), whole_network(micro_batch_size=30)
    moments = by_four.moments(clips)
    torch.testing.assert_close(by_thirty.moments(clips), moments)
    apart = [by_four.moments(window) for window in clips.split([17, 4], dim=2)]
    torch.testing.assert_close(torch.cat(apart, dim=2), moments)
    together = whole_network(micro_frame_size=None).moments(clips)
    assert together.shape == moments.shape
    assert not torch.allclose(together, moments, atol=1e-3)
    latents = by_four.latents(moments)
    pieces = [piece.shape[2] for piece in by_four.decode_windows(latents, 21)]
    assert pieces == [17, 4]
    torch.testing.assert_close(by_thirty.decode(latents, 21), by_four.decode(latents, 21))


def test_numbers_of_latent_frames_are_those_of_the_reference():
    temporal = TemporalAutoencoder(**TEMPORAL["constructor"])
    for row in TEMPORAL["latent_sizes"]:
        assert temporal.latent_frames(row["input"][0]) == row["latent"][0]
    whole = OpenSoraAutoencoder(nn.Identity(), temporal)
    for row in WHOLE["latent_sizes"]:
        assert whole.latent_frames(row["input"][0]) == row["latent"][0]


def test_the_published_network_has_the_tensors_of_its_file():
    from diffusers import AutoencoderKL

    manifest = load_manifest("opensora_vae_v1_2", "opensora")
    with torch.device("meta"):
        network = OpenSoraAutoencoder(AutoencoderKL(**manifest["constructor"]["vae_2d"]), TemporalAutoencoder())
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]


def test_scale_and_shift_are_the_published_ones():
    assert [*SHIFT] == WHOLE["constructor"]["shift"]
    assert [*SCALE] == WHOLE["constructor"]["scale"]


def test_checkpointing_changes_no_gradient():
    network = temporal_network()
    (frames,) = resolve(TEMPORAL_CALLS["encode_5"]["args"], TEMPORAL_TENSORS)

    def gradients() -> list[Tensor]:
        moments = network.encode(frames)
        loss = moments.square().sum() + network.decode(moments[:, :4], 5).square().sum()
        return torch.autograd.grad(loss, list(network.parameters()))

    plain = gradients()
    network.set_activation_checkpointing(3)
    assert len(network.blocks) == sum(block.checkpointed for block in network.blocks) == 10
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_latents_of_another_number_of_frames_are_refused():
    network = OpenSoraAutoencoder(nn.Identity(), temporal_network())
    with pytest.raises(ValueError, match="latents of 5 frames cannot be decoded to 21: 21 frames have 6 latents"):
        network.decode(torch.zeros(1, 4, 5, 2, 2), 21)
    with pytest.raises(ValueError, match="latents of 1 frames cannot be decoded to 5: 5 frames have 2 latents"):
        network.temporal_vae.decode(torch.zeros(1, 4, 1, 2, 2), 5)
    with pytest.raises(ValueError, match="one for each of the 3 steps between levels"):
        TemporalAutoencoder(temporal_downsample=[True])
