"""The autoencoder of clips: frozen, it does what diffusers' does; trained, it sees whole clips with equal numbers."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from families.common.autoencoder_training import FIRST_LOG_VARIANCE, LatentStatistics, whitened_weights
from families.common.library_files import constructor_numbers
from families.common.wan_autoencoder import WanAutoencoder
from families.common.wan_training import TrainedWanAutoencoder, from_scratch
from families.cosmos.build import autoencoder_by_itself
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
SIZES = {
    "patches": {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "z_dim": 4, "patch_size": 2},
    "four levels": {"base_dim": 8, "dim_mult": [1, 2, 2, 1], "num_res_blocks": 2, "z_dim": 4, "patch_size": 1},
}


def disturbed(sizes: str = "patches", **numbers) -> diffusers.AutoencoderKLWan:
    """An autoencoder in which no layer begins as nothing."""
    torch.manual_seed(1)
    model = from_scratch(**SIZES[sizes])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    library = diffusers.AutoencoderKLWan(**constructor_numbers(model.config) | numbers)
    library.load_state_dict(model.state_dict())
    return library.eval()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_a_whole_clip_has_the_numbers_of_the_librarys_pieces(sizes, frames):
    library = disturbed(sizes)
    ours = TrainedWanAutoencoder(disturbed(sizes))
    clips = torch.rand(2, frames, 3, 16, 24)
    posterior = library.encode(clips.transpose(1, 2) * 2 - 1).latent_dist
    rebuilt, latents, divergence = ours(clips)
    assert latents.shape[1:] == ours.latent_shape(clips.shape) == (4, 1 + frames // 4, 2, 3)
    torch.testing.assert_close(latents, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(divergence, kl(posterior), rtol=1e-4, atol=1e-3)
    theirs = library.decode(latents).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(rebuilt.clamp(0, 1), theirs, atol=1e-4, rtol=1e-4)
    noise = torch.randn_like(latents)
    torch.testing.assert_close(ours(clips, noise)[1], posterior.mean + posterior.std * noise, atol=1e-4, rtol=1e-4)


def kl(posterior) -> torch.Tensor:
    standard = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    own = torch.distributions.Normal(posterior.mean, posterior.std)
    return torch.distributions.kl_divergence(own, standard).flatten(1).sum(dim=1)


@torch.no_grad()
def test_from_scratch_signals_keep_their_size_and_frames_are_repeated():
    torch.manual_seed(0)
    model = from_scratch(24, [1, 2, 3], 1, 16, 2)
    ours = TrainedWanAutoencoder(model)
    x = torch.randn(2, 3, 9, 32, 32)
    moments = ours.encode(x)
    log_variance = moments.chunk(2, dim=1)[1]
    torch.testing.assert_close(log_variance, torch.full_like(log_variance, FIRST_LOG_VARIANCE), atol=0.5, rtol=0)
    hidden = model.encoder.conv_in(torch.randn(2, 12, 5, 16, 16))
    assert 0.5 < hidden.std() < 2
    block = model.encoder.down_blocks[0]
    greys = [model.encoder.conv_in(torch.full((1, 12, 1, 8, 8), value)) for value in (0.1, 0.3)]
    darker, brighter = (block.norm1(grey)[..., 4, 4] for grey in greys)
    assert torch.cosine_similarity(darker, brighter, dim=1) < 0.999  # how bright a grey is survives norms
    assert torch.equal(block(hidden), hidden)
    doubling = model.decoder.up_blocks[0].upsamplers[0].time_conv
    still = torch.randn(1, 72, 1, 4, 4).expand(-1, -1, 4, -1, -1)
    first, second = doubling(still)[:, :, 2:].chunk(2, dim=1)  # beyond the beginning, which has nothing before it
    for shown in (first, second):
        assert torch.cosine_similarity(shown.flatten(), still[:, :, 2:].flatten(), dim=0) > 0.7


@torch.no_grad()
def test_the_frozen_autoencoder_takes_clips_and_their_first_frame_is_a_picture(tmp_path):
    numbers = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 1.5]}
    library = disturbed(**numbers)
    library.save_pretrained(tmp_path / "saved")
    frozen = WanAutoencoder.load(tmp_path / "saved")
    clips = torch.randint(256, (2, 9, 3, 16, 24), dtype=torch.uint8)
    posterior = library.encode(clips.transpose(1, 2) / 127.5 - 1).latent_dist
    moments = frozen.moments(clips)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    torch.testing.assert_close(moments[:, :, 0], frozen.moments(clips[:, 0]), atol=1e-5, rtol=1e-5)
    latents = frozen.scale.latents(moments, None)
    mean, std = (torch.tensor(numbers[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (posterior.mean - mean) / std)
    rebuilt = frozen.decode(latents)
    theirs = library.decode(posterior.mean).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(rebuilt, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rebuilt[:, 0], frozen.decode(latents[:, :, 0]), atol=1e-5, rtol=1e-5)


def test_frames_that_the_library_would_drop_are_an_error():
    frozen = WanAutoencoder(constructor_numbers(disturbed().config))
    with pytest.raises(UserError, match=r"clips of 16 frames; this autoencoder takes 1 .* such as 13 or 17"):
        frozen.moments(torch.zeros(1, 16, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"num_frames: clips of 8 frames.* such as 5 or 9"):
        TrainedWanAutoencoder(disturbed()).latent_shape(torch.Size((1, 8, 3, 16, 16)))


@torch.no_grad()
def test_exported_weights_are_the_same_autoencoder_with_whitened_latents(tmp_path):
    ours, statistics = TrainedWanAutoencoder(disturbed()), LatentStatistics(4)
    clips = torch.randint(256, (64, 5, 3, 16, 16), dtype=torch.uint8)
    rebuilt, latents, _ = ours(clips / 255)
    statistics.step(**LatentStatistics.of(latents))
    weights = {name: tensor.contiguous() for name, tensor in whitened_weights(ours.model, statistics).items()}
    save_file(weights, tmp_path / "autoencoder.safetensors", ours.metadata_to_save())
    frozen = autoencoder_by_itself(tmp_path / "autoencoder.safetensors")
    assert (frozen.compression, frozen.latent_channels) == (8, 4)
    whitened = frozen.scale.latents(frozen.moments(clips), None)
    torch.testing.assert_close(frozen.decode(whitened), rebuilt.clamp(0, 1), atol=1e-3, rtol=1e-3)
    channels = whitened.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    raw = latents.transpose(0, 1).flatten(1).cov()
    far = (raw / raw.diagonal().mean() - torch.eye(4)).abs().max()
    assert (channels.cov() - torch.eye(4)).abs().max() < min(0.3, far / 2)  # what hardly varies is not raised to 1


def test_a_run_in_16_bits_whitens_as_one_in_32_bits_does():
    latents = 5 + 0.1 * torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, found = LatentStatistics(4), LatentStatistics(4)
    expected.step(**LatentStatistics.of(latents))
    with torch.autocast("cpu", torch.bfloat16):
        found.step(**LatentStatistics.of(latents))
    torch.testing.assert_close(found.whitening(), expected.whitening())


def test_gradients_reach_every_weight_with_and_without_checkpointing():
    clips, noise = torch.rand(1, 9, 3, 16, 16), torch.randn(1, 4, 3, 2, 2)
    gradients = []
    for level in (0, 3):
        ours = TrainedWanAutoencoder(disturbed())
        ours.set_activation_checkpointing(level)
        rebuilt, _, divergence = ours(clips, noise)
        (rebuilt.square().sum() + divergence.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])
