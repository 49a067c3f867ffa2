"""The previewer: a quick look at Stage C's latents, eight times as wide and high as they are."""

from torch import Tensor, nn


class Previewer(nn.Module):
    """Latents (B, c_in, H, W) -> pictures (B, c_out, 8 H, 8 W), about in [0, 1].

    Args:
        c_in: channels of the latents. c_hidden: widest layer, a multiple of 4. c_out: channels of the picture.
    """

    def __init__(self, c_in: int = 16, c_hidden: int = 512, c_out: int = 3):
        super().__init__()

        def activated(conv: nn.Module) -> list[nn.Module]:
            return [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]

        def doubled(c_from: int, c_to: int) -> list[nn.Module]:
            return [
                *activated(nn.ConvTranspose2d(c_from, c_to, kernel_size=2, stride=2)),
                *activated(nn.Conv2d(c_to, c_to, kernel_size=3, padding=1)),
            ]

        half, quarter = c_hidden // 2, c_hidden // 4
        self.blocks = nn.Sequential(
            *activated(nn.Conv2d(c_in, c_hidden, kernel_size=1)),
            *activated(nn.Conv2d(c_hidden, c_hidden, kernel_size=3, padding=1)),
            *doubled(c_hidden, half),
            *doubled(half, quarter),
            *doubled(quarter, quarter),
            nn.Conv2d(quarter, c_out, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
