"""Filters: what a ControlNet's condition is made of pictures with. `FILTERS` holds them by their name in a config."""

from modules.filters.base import Filter, Filtered
from modules.filters.canny import CannyFilter
from modules.filters.identity import IdentityFilter
from modules.filters.inpaint import InpaintFilter
from modules.filters.member import DepthFilter, SegmentationFilter
from modules.filters.pidi import PidiFilter
from modules.filters.pose import PoseFilter
from modules.filters.qr import QRFilter
from modules.filters.super_resolution import SREffnetFilter, SRFilter

FILTERS: dict[str, type[Filter]] = {
    kind.__name__: kind
    for kind in (
        CannyFilter, DepthFilter, IdentityFilter, InpaintFilter, PidiFilter, PoseFilter, QRFilter, SegmentationFilter,
        SREffnetFilter, SRFilter,
    )
}  # fmt: skip

__all__ = ["FILTERS", "Filter", "Filtered"]
