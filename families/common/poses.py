"""Key points of people, read beside a picture and drawn with its crop. Workers import this, so it stays light."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.filters.pose import as_18_points, draw_people
from warpcore.data.fields import BadMember
from warpcore.data.images import Geometry
from warpcore.data.samples import Sample
from warpcore.errors import UserError
from warpcore.safe_json import parse_json

FARTHEST_PX = 2**20
"""Points lie within this distance of the corner of their picture; OpenCV could not draw those that are very far."""


def read_people(data: bytes, size: tuple[int, int]) -> list[np.ndarray]:
    """The key points (18, 3) of people, x, y and confidence, in px of a picture of `size` (H, W).

    data: JSON as OpenPose writes it, `{"people": [{"pose_keypoints_2d": [x, y, confidence, ...]}, ...]}`. The points
        are in px of the picture, or of a canvas whose size stands beside (`canvas_width`, `canvas_height`).

    Raises ValueError where it is something else.
    """
    try:
        people = _people(data, size)
    except (TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not all((np.abs(points) < FARTHEST_PX).all() for points in people):  # neither is what is no number
        raise ValueError("a point lies far outside the picture")
    return people


def _people(data: bytes, size: tuple[int, int]) -> list[np.ndarray]:
    content = parse_json(data)
    if not isinstance(content, dict) or not isinstance(content.get("people"), list):
        raise ValueError('a pose is JSON such as {"people": [{"pose_keypoints_2d": [x, y, confidence, ...]}]}')
    height, width = size
    scale = np.array([width / content.get("canvas_width", width), height / content.get("canvas_height", height), 1])
    flat = [np.array(one["pose_keypoints_2d"], float) for one in content["people"]]
    return [as_18_points(points.reshape(-1, 3)) * scale for points in flat]


@dataclass(frozen=True)
class PoseField:
    """The skeletons of a sample's people, drawn with the crop of its picture: uint8 (3, H, W)."""

    suffixes: tuple[str, ...]

    def decode(self, data: bytes, geometry: Geometry | None, sample: Sample) -> Tensor:
        if geometry is None:
            raise UserError(f".{self.suffixes[0]} is cropped like its picture, but this run reads no pictures")
        try:
            people = read_people(data, geometry.source)
        except ValueError as error:
            raise BadMember(str(error)) from error
        scale = np.array(geometry.resized[::-1]) / geometry.source[::-1]
        for points in people:
            points[:, :2] = points[:, :2] * scale - (geometry.left, geometry.top)
        return torch.from_numpy(draw_people(people, geometry.size).transpose(2, 0, 1).copy())

    def blank(self, size: tuple[int, int]) -> Tensor:
        return torch.zeros(3, *size, dtype=torch.uint8)
