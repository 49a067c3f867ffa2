"""The semantic compressor: pictures to the small latents that Stage C works on."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per RGB channel

# kind, expansion, kernel size, stride, channels in, channels out, layers: EfficientNetV2-S (arXiv:2104.00298, table 4)
EFFICIENTNET_V2_S = (
    ("fused", 1, 3, 1, 24, 24, 2),
    ("fused", 4, 3, 2, 24, 48, 4),
    ("fused", 4, 3, 2, 48, 64, 4),
    ("mbconv", 4, 3, 2, 64, 128, 6),
    ("mbconv", 6, 3, 1, 128, 160, 9),
    ("mbconv", 6, 3, 2, 160, 256, 15),
)
STAGE_KINDS = {"fused": FusedMBConvConfig, "mbconv": MBConvConfig}


def normalise_images(images: Tensor, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as the encoder was trained to see them."""
    # Filled where the pictures are: numbers copied to a GPU would make Python wait for it.
    mean, std = (torch.stack([images.new_full((1, 1), value) for value in values]) for values in (mean, std))
    return (images - mean) / std


class EfficientNetEncoder(nn.Module):
    """Normalised pictures (B, 3, H, W) -> latents (B, c_latent, ceil(H / compression), ceil(W / compression)).

    Args:
        c_latent: channels of the latents.
        stages: the backbone's stages, each (kind, expansion, kernel size, stride, channels in, channels out, layers)
            with kind "fused" or "mbconv". A stem of stride 2 stands before them, a 1x1 layer five times as wide as the
            last stage behind them. The default is EfficientNetV2-S.
        stochastic_depth: how often the last layer is skipped in training; earlier ones less, in proportion.

    `compression` is the pixels per latent position. Callers normalise: see `normalise_images`.
    """

    def __init__(
        self, c_latent: int = 16, stages: Sequence[Sequence] = EFFICIENTNET_V2_S, stochastic_depth: float = 0.2
    ):
        super().__init__()
        self.backbone = efficientnet_backbone(stages, stochastic_depth)
        self.compression = 2 * math.prod(stage[3] for stage in stages)
        c_last = feature_channels(stages)
        self.mapper = nn.Sequential(nn.Conv2d(c_last, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.mapper(self.backbone(x))


def efficientnet_backbone(stages: Sequence[Sequence], stochastic_depth: float = 0.2) -> nn.Sequential:
    """The layers of an EfficientNet before its classifier: pictures (B, 3, H, W) -> features (B, C, h, w)."""
    settings = [_stage(*stage) for stage in stages]
    _check_chain(settings)
    return EfficientNet(
        settings,
        dropout=0.0,
        stochastic_depth_prob=stochastic_depth,
        num_classes=1,
        norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3),
        last_channel=feature_channels(stages),
    ).features


def feature_channels(stages: Sequence[Sequence]) -> int:
    """C of the backbone's features."""
    return 5 * stages[-1][5]


def _stage(kind: str, *numbers: int) -> FusedMBConvConfig | MBConvConfig:
    if kind not in STAGE_KINDS or len(numbers) != 6:
        raise ValueError(
            f"encoder stage {[kind, *numbers]} should be [kind, expansion, kernel size, stride, channels in, channels "
            f"out, layers] with kind {' or '.join(STAGE_KINDS)}, for example {list(EFFICIENTNET_V2_S[1])}"
        )
    setting = STAGE_KINDS[kind](*numbers)
    if (setting.input_channels, setting.out_channels) != (numbers[3], numbers[4]):  # torchvision rounds them
        raise ValueError(f"encoder stage {[kind, *numbers]}: channels of {kind!r} stages must be multiples of 8")
    return setting


def _check_chain(stages: list[FusedMBConvConfig | MBConvConfig]) -> None:
    for number, (stage, following) in enumerate(pairwise(stages), start=2):
        if following.input_channels != stage.out_channels:
            raise ValueError(
                f"encoder stage {number} takes {following.input_channels} channels, but the stage before it "
                f"gives {stage.out_channels}"
            )
