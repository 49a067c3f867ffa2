"""Distance of pictures as a trained picture classifier sees them (LPIPS without learnt weights, arXiv:1801.03924)."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

from modules.effnet import normalise_images

LAYERS = (3, 8, 15, 22, 29)
"""Of torchvision's VGG-16: the last activation before each halving of the sides."""


class PerceptualDistance(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] twice -> distances (B,). State dict: that of torchvision's VGG-16 features."""

    def __init__(self):
        super().__init__()
        self.features = vgg16(weights=None).features[: LAYERS[-1] + 1]

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        pairs = zip(self._activations(pictures), self._activations(others), strict=True)
        return sum((F.normalize(a) - F.normalize(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs)

    def _activations(self, pictures: Tensor) -> list[Tensor]:
        x, found = normalise_images(pictures), []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in LAYERS:
                found.append(x)
        return found
