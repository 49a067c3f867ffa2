"""How alike pictures are: the same numbers wherever they are measured."""

import torch
import torch.nn.functional as F

from families.common.pictures import image_metrics


def test_a_run_in_16_bits_measures_what_one_in_32_bits_does():
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    true = 0.4 + 0.2 * F.interpolate(coarse, (64, 64), mode="bilinear")
    made = true + 0.01 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    expected = image_metrics(made, true)
    with torch.autocast("cpu", torch.bfloat16):
        found = image_metrics(made, true)
    for name in ("psnr", "ssim"):
        torch.testing.assert_close(found[name], expected[name])
    assert (expected["ssim"] > 0.9).all()
