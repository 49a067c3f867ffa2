"""PiDiNet: a small network that finds edges by pixel differences (arXiv:2108.07009).

Parameter names and shapes are those of the published `table5_pidinet.pth`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the eight neighbours, clockwise from the left one, and of those two pixels away, in a 3x3 and a 5x5 kernel.
_CLOCKWISE_BEFORE = [3, 0, 1, 6, 4, 2, 7, 8, 5]
_RING = [0, 1, 2, 3, 5, 6, 7, 8]


def plain(weight: Tensor) -> Tensor:
    """The pixels themselves. Here and below, kernels are (C_out, C_in / groups, 3, 3)."""
    return weight


def central_difference(weight: Tensor) -> Tensor:
    """Each neighbour minus the middle: equation 2."""
    middle = torch.zeros_like(weight)
    middle[:, :, 1, 1] = weight.sum(dim=(2, 3))
    return weight - middle


def angular_difference(weight: Tensor) -> Tensor:
    """Each neighbour minus the next one, clockwise: equation 3."""
    flat = weight.flatten(2)
    before = torch.stack([flat[:, :, place] for place in _CLOCKWISE_BEFORE], dim=2)
    return (flat - before).view_as(weight)


def radial_difference(weight: Tensor) -> Tensor:
    """Each pixel two away minus the neighbour on the way there: equation 4. (C, 1, 3, 3) -> (C, 1, 5, 5)."""
    # The published weights are numbered so that the first of nine is unused and the others follow in reading order.
    outer = weight.flatten(2)[:, :, 1:]
    kernel = weight.new_zeros(*weight.shape[:2], 5, 5)
    for value, place in zip(outer.unbind(2), _RING, strict=True):
        row, column = divmod(place, 3)
        kernel[:, :, row * 2, column * 2] = value
        kernel[:, :, row + 1, column + 1] = -value
    return kernel


DIFFERENCES: tuple[Callable[[Tensor], Tensor], ...] = (
    central_difference, angular_difference, radial_difference, plain,
)  # fmt: skip
"""What the layers look at, over and over: the network that is published as `carv4`."""


class DifferenceConv(nn.Conv2d):
    """A 3x3 convolution of differences of pixels: one of pixels, with a kernel made of its own.

    (B, c_in, H, W) -> (B, c_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int, difference: Callable[[Tensor], Tensor], groups: int = 1):
        super().__init__(c_in, c_out, 3, groups=groups, bias=False)
        self.difference = difference

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.difference(self.weight), padding="same", groups=self.groups)


class DifferenceBlock(nn.Module):
    """Differences in each channel, mixed, beside a shortcut: (B, c_in, H, W) -> (B, c_out, H, W).

    halve: to half of H and W, rounded down.
    """

    def __init__(self, c_in: int, c_out: int, difference: Callable[[Tensor], Tensor], halve: bool):
        super().__init__()
        self.halve = halve
        if halve:
            self.shortcut = nn.Conv2d(c_in, c_out, 1)
        self.conv1 = DifferenceConv(c_in, c_in, difference, groups=c_in)
        self.conv2 = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2) if self.halve else x
        found = self.conv2(self.conv1(x).relu())
        return found + (self.shortcut(x) if self.halve else x)


class Dilations(nn.Module):
    """Looks at a place with four reaches: (B, c_in, H, W) -> (B, c, H, W)."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1)
        for number, dilation in enumerate((5, 7, 9, 11), start=1):
            conv = nn.Conv2d(c, c, 3, dilation=dilation, padding=dilation, bias=False)
            self.add_module(f"conv2_{number}", conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.relu())
        return self.conv2_1(x) + self.conv2_2(x) + self.conv2_3(x) + self.conv2_4(x)


class SpatialAttention(nn.Module):
    """Weighs each place of (B, C, H, W) by a number in (0, 1)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.relu())).sigmoid()


class PiDiNet(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> how likely each pixel is on an edge (B, 1, H, W). Sides of 8 px or more."""

    def __init__(self, c: int = 60, c_scale: int = 24):
        super().__init__()
        self.init_block = DifferenceConv(3, c, DIFFERENCES[0])
        widths = (c, 2 * c, 4 * c, 4 * c)
        for level, width in enumerate(widths):
            for number in range(4 if level else 3):  # the first layer of the first level is `init_block`
                first = level and not number
                difference = DIFFERENCES[number if level else number + 1]
                block = DifferenceBlock(widths[level - 1] if first else width, width, difference, halve=bool(first))
                self.add_module(f"block{level + 1}_{number + 1}", block)
        self.dilations = nn.ModuleList(Dilations(width, c_scale) for width in widths)
        self.attentions = nn.ModuleList(SpatialAttention(c_scale) for _ in widths)
        self.conv_reduces = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(c_scale, 1, 1)}) for _ in widths)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, edges = x.shape[2:], []
        x = self.init_block(x)
        for level in range(4):
            for number in range(4 if level else 3):
                x = self.get_submodule(f"block{level + 1}_{number + 1}")(x)
            edge = self.conv_reduces[level]["conv"](self.attentions[level](self.dilations[level](x)))
            edges.append(F.interpolate(edge, size, mode="bilinear"))
        return self.classifier(torch.cat(edges, dim=1)).sigmoid()
