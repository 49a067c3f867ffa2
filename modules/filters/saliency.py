"""What catches the eye in a picture: the small network that the published inpainting was trained with."""

from torch import Tensor, nn


def _convolution(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.ReflectionPad2d(kernel_size // 2),
        nn.Conv2d(c_in, c_out, kernel_size, stride),
        nn.InstanceNorm2d(c_out, affine=True),
        nn.ReLU(),
    ]


class Saliency(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], 240 px on the shorter side -> saliency (B, 1, about H / 8, W / 8) in (0, 1).

    Parameter names and shapes are those of the published `saliency_model.pt`.
    """

    def __init__(self):
        super().__init__()
        self.downsampler = nn.Sequential(
            *_convolution(3, 8, 9, stride=4), *_convolution(8, 16, 3, stride=2), *_convolution(16, 32, 3, stride=2)
        )
        self.residual = nn.Sequential(
            ResidualPair(32), nn.Conv2d(32, 64, kernel_size=1, groups=32, bias=False), ResidualPair(64)
        )
        self.segmentator = nn.Sequential(
            *_convolution(64, 16, 3),
            nn.Upsample(scale_factor=2),
            nn.ReflectionPad2d(4),
            nn.Conv2d(16, 1, 9),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentator(self.residual(self.downsampler(x)))


class ResidualPair(nn.Module):
    """Two convolutions beside a shortcut, on (B, C, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        self.resblock = nn.Sequential(*_convolution(c, c, 3), *_convolution(c, c, 3)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.resblock(x)
