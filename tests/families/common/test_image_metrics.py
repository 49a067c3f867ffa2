"""How alike pictures are: of clips, frame by frame."""

import numpy as np
import pytest
import torch

from families.common.pictures import image_metrics


def _clips() -> tuple[torch.Tensor, torch.Tensor]:
    true = torch.rand(2, 5, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    return (true + 0.1 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1), true


def test_a_clip_is_measured_as_the_mean_of_its_frames():
    made, true = _clips()
    of_clips = image_metrics(made, true)["ssim"]
    of_frames = image_metrics(made.flatten(0, 1), true.flatten(0, 1))["ssim"]
    torch.testing.assert_close(of_clips, of_frames.unflatten(0, (2, 5)).mean(dim=1))


def test_the_psnr_of_a_clip_is_that_of_all_its_pixels():
    made, true = _clips()
    expected = -10 * np.log10((made - true).square().flatten(1).mean(dim=1).numpy())
    assert image_metrics(made, true)["psnr"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
