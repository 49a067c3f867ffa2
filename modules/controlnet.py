"""ControlNet: an adapter that turns a condition beside the text, such as edges, into residuals for Stage C.

After arXiv:2302.05543, but with a small network in place of a copy of the generator, in the form published with Stable
Cascade. Constructor arguments, parameter names and shapes are those of the official checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.blocks import Conv, PointwiseConv
from modules.effnet import EFFICIENTNET_V2_S, IMAGE_MEAN, IMAGE_STD, efficientnet_backbone, feature_channels

BOTTLENECK_MODES = ("effnet", "simple", "large")
SLOPE = 0.2  # of the activations below 0


class ControlNet(nn.Module):
    """Conditions (B, c_in, H, W) -> residuals for the convolution blocks of Stage C: its `cnet`.

    A new one changes nothing, as its output layers start at 0. The norms of the backbone never change their
    statistics.

    Args:
        c_in: channels of the condition.
        c_proj: channels of the controlled blocks.
        proj_blocks: numbers of the controlled blocks: convolution blocks of Stage C, from 0, as they run.
        bottleneck_mode: the backbone. `effnet`, that of the encoder, is for pictures; `simple`, two convolutions, for
            maps of few positions; `large`, wide and deep without changing the size, for the encoder's latents.
        stages: of the `effnet` backbone, as in `EfficientNetEncoder`.
        patch_size: that of Stage C. One of its positions gets the features of `patch_size` per side.
        official_stem: leave the first convolution of an `effnet` for other than 3 channels without its padding, as the
            published files want it.
    """

    def __init__(
        self,
        c_in: int = 3,
        c_proj: int = 2048,
        proj_blocks: Sequence[int] = (0, 4, 8, 12, 51, 55, 59, 63),
        bottleneck_mode: str = "effnet",
        stages: Sequence[Sequence] = EFFICIENTNET_V2_S,
        patch_size: int = 1,
        official_stem: bool = False,
    ):
        super().__init__()
        if not proj_blocks or len(set(proj_blocks)) < len(proj_blocks) or min(proj_blocks) < 0:
            raise ValueError(f"proj_blocks {list(proj_blocks)}: needs block numbers from 0 on, each of them once")
        if bottleneck_mode not in BOTTLENECK_MODES:
            raise ValueError(f"bottleneck_mode {bottleneck_mode!r} does not exist: {', '.join(BOTTLENECK_MODES)}")
        self.proj_blocks, self.bottleneck_mode, self.checkpointed = tuple(proj_blocks), bottleneck_mode, False
        if bottleneck_mode == "effnet":
            c = feature_channels(stages)
            self.backbone = efficientnet_backbone(stages)
            if c_in != 3:
                padding = 0 if official_stem else 1
                width = self.backbone[0][0].out_channels
                self.backbone[0][0] = nn.Conv2d(c_in, width, 3, stride=2, padding=padding, bias=False)
        elif bottleneck_mode == "simple":
            c = c_in
            self.backbone = nn.Sequential(
                Conv(c, c * 4, kernel_size=3, padding=1), nn.LeakyReLU(SLOPE), Conv(c * 4, c, kernel_size=3, padding=1)
            )
        else:
            c = 1280
            self.backbone = nn.Sequential(
                PointwiseConv(c_in, 16384), nn.LeakyReLU(SLOPE), PointwiseConv(16384, 1024),
                *(ControlNetBlock(1024) for _ in range(8)), PointwiseConv(1024, c),
            )  # fmt: skip
        self.projections = nn.ModuleList(
            nn.Sequential(
                Conv(c, c, kernel_size=patch_size, stride=patch_size, bias=False),
                nn.LeakyReLU(SLOPE),
                PointwiseConv(c, c_proj, bias=False),
            )
            for _ in proj_blocks
        )
        for projection in self.projections:
            nn.init.kaiming_normal_(projection[0].weight, a=SLOPE)
            nn.init.zeros_(projection[-1].weight)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for the norms and the stochastic depth of the backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def start_from_encoder(self, encoder: Mapping[str, Tensor]) -> None:
        """Take over the backbone of the encoder with the state dict `encoder`, where it is an `effnet`.

        It sees a condition as the encoder sees a normalised picture: the first three channels as RGB, others not yet.
        One channel is seen as shades of grey, from the mean at 0 up, so that no edge is nothing to see.
        """
        if self.bottleneck_mode != "effnet":
            return
        state = {name.removeprefix("backbone."): t for name, t in encoder.items() if name.startswith("backbone.")}
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        # The normalisation becomes part of the first convolution and of the norm behind it.
        rgb, c_in = state["0.0.weight"] / std, self.backbone[0][0].in_channels
        stem = torch.zeros_like(self.backbone[0][0].weight)
        if c_in < 3:
            stem += rgb.sum(dim=1, keepdim=True) / c_in
        else:
            stem[:, :3] = rgb
            state["0.1.running_mean"] = state["0.1.running_mean"] + (rgb * mean).sum(dim=(1, 2, 3))
        self.backbone.load_state_dict(state | {"0.0.weight": stem})

    def set_activation_checkpointing(self, level: int) -> None:
        """0 keeps all activations; from 1 on, those of the backbone are computed again in the backward pass."""
        self.checkpointed = level > 0

    def forward(self, x: Tensor) -> list[Tensor | None]:
        """Residuals (B, c_proj, h, w) in the order of Stage C's blocks, None for those that aren't controlled."""
        channels_last = self.bottleneck_mode != "effnet"
        x = x.permute(0, 2, 3, 1) if channels_last else x
        for layer in self.backbone:
            again = self.checkpointed and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        x = x if channels_last else x.permute(0, 2, 3, 1)
        residuals: list[Tensor | None] = [None] * (max(self.proj_blocks) + 1)
        for number, projection in zip(self.proj_blocks, self.projections, strict=True):
            residuals[number] = projection(x).permute(0, 3, 1, 2)
        return residuals


class ControlNetBlock(nn.Module):
    """Two normed convolutions beside a shortcut, on (B, H, W, C)."""

    def __init__(self, c: int):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.LayerNorm(c), nn.GELU(), Conv(c, c, kernel_size=3, padding=1),
            nn.LayerNorm(c), nn.GELU(), Conv(c, c, kernel_size=3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)
