"""Pictures that another tool made of a picture and stored beside it: depth, segments."""

from collections.abc import Sequence

from torch import Tensor

from modules.filters.base import Filter, Filtered


class SegmentationFilter(Filter):
    """A picture that lies beside the sample's, such as its segments in colours.

    member: its extension, as in `0000.seg.png`.
    """

    def __init__(self, member: str = "seg.png"):
        self.member = member

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        return Filtered(images, images)


class DepthFilter(Filter):
    """A grey picture that lies beside the sample's, such as its depth (8 or 16 bits).

    member: its extension, as in `0000.depth.png`.
    """

    channels = 1

    def __init__(self, member: str = "depth.png"):
        self.member = member

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        return Filtered.grey(images.mean(dim=1, keepdim=True))
