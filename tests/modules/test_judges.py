"""What judges Stage A's reconstructions: the patch discriminator and the perceptual distance."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16
from torchvision.models.feature_extraction import create_feature_extractor

from modules.discriminator import PatchDiscriminator
from modules.perceptual import PerceptualDistance


def test_the_discriminator_judges_each_picture_alone_and_patch_by_patch():
    torch.manual_seed(0)
    network, pictures = PatchDiscriminator(8), torch.rand(3, 3, 128, 96)
    scores = network(pictures)
    assert scores.shape[:2] == (3, 1)
    torch.testing.assert_close(network(pictures[1:2]), scores[1:2])


@pytest.mark.integration
@pytest.mark.bits
def test_the_perceptual_distance_compares_the_features_of_torchvisions_vgg():
    torch.manual_seed(0)
    theirs = vgg16(weights=None).eval()
    ours = PerceptualDistance().eval()
    ours.load_state_dict(
        {name: t for name, t in theirs.state_dict().items() if name in ours.state_dict()}, strict=True
    )
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    names = [f"features.{i}" for i in (3, 8, 15, 22, 29)]  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    extractor = create_feature_extractor(theirs, names)
    first, second = (extractor((x - mean[:, None, None]) / std[:, None, None]) for x in (a, b))
    expected = sum(
        (F.normalize(first[n], dim=1) - F.normalize(second[n], dim=1)).pow(2).sum(1).mean(dim=(1, 2)) for n in names
    )
    torch.testing.assert_close(ours(a, b), expected)
    assert torch.equal(ours(a, a), torch.zeros(2))
