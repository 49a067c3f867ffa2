"""The noise of Stage B's training, against the reference implementation's numbers."""

import torch

from families.cascade.diffusion import blend_levels, pyramid_noise
from tests.golden import load_case
from warpcore.random import SampleRandom


def test_levels_are_blended_as_in_the_reference():
    spec, tensors = load_case("stage_b_pyramid_noise")
    for call in spec["calls"]:
        if call["arguments"].get("scale_mode"):
            continue  # no trainer uses it
        noise, draws = tensors[call["epsilon"]], [tensors[name] for name in call["draws_in_order"]]
        # The reference draws squares of side height // 2^level; blending does not mind the shape.
        level_of = {noise.shape[2] // 2**level: level for level in range(1, 10)}
        ours = blend_levels([(0, noise), *((level_of[draw.shape[-1]], draw) for draw in draws)])
        expected = tensors[call["result"]["tensor"]]
        torch.testing.assert_close(ours, expected, rtol=0, atol=spec["suggested_atol"])


def test_coarse_noise_keeps_the_shape_of_the_picture_and_a_deviation_of_one():
    noise = pyramid_noise(SampleRandom(list(range(400)), torch.device("cpu")), 4, (8, 16), size_range=(1, 4))
    assert noise.shape == (400, 4, 8, 16)
    assert abs(noise.std().item() - 1) < 0.02
    # Neighbours two by two share the noise of every level but the first: (0.75^2 + 0.75^4 + 0.75^6) / 2.057 of it.
    shared = sum(0.75 ** (2 * level) for level in (1, 2, 3)) / sum(0.75 ** (2 * level) for level in (0, 1, 2, 3))
    covariance = (noise[..., 0::2] * noise[..., 1::2]).mean().item()
    assert abs(covariance - shared) < 0.02
    rows = (noise[..., 0::2, :] * noise[..., 1::2, :]).mean().item()
    assert abs(rows - shared) < 0.02
