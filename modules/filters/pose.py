"""The poses of people, as another tool found them."""

from collections.abc import Sequence

import cv2
import numpy as np

from modules.filters.member import SegmentationFilter


class PoseFilter(SegmentationFilter):
    """The skeletons of people, drawn from their key points.

    member: the extension of a file of key points (`0000.pose.json`, as OpenPose writes it), or of a picture of
    skeletons that another tool drew (`0000.pose.png`).
    """

    def __init__(self, member: str = "pose.json"):
        super().__init__(member)


# Bones between the 18 key points of OpenPose's COCO model: nose, neck, right arm, left arm, right leg, left leg, eyes,
# ears.
BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_OF_BODY_25 = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
_OF_COCO_17 = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]


def as_18_points(points: np.ndarray) -> np.ndarray:
    """Key points (K, 3) x, y, confidence, with K = 18, 25 (OpenPose's models) or 17 (COCO) -> (18, 3).

    Raises ValueError for another number of them.
    """
    match len(points):
        case 18:
            return points
        case 25:
            return points[_OF_BODY_25]
        case 17:
            shoulders = points[[5, 6]]
            neck = np.append(shoulders[:, :2].mean(axis=0), shoulders[:, 2].min())
            return np.stack([neck if place is None else points[place] for place in _OF_COCO_17])
    raise ValueError(f"a person has {len(points)} key points; 17 (COCO), 18 or 25 (OpenPose) are understood")


def draw_people(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Skeletons on black, uint8 (H, W, 3), each bone in a colour of its own.

    people: key points (18, 3) each: x, y in px and confidence; points with confidence 0 are left out.
    """
    canvas = np.zeros((*size, 3), np.uint8)
    thickness = max(1, round(min(size) / 64))
    hues = (np.arange(len(BONES)) * 180 / len(BONES)).astype(np.uint8)
    colours = cv2.cvtColor(
        np.stack([hues, np.full_like(hues, 255), np.full_like(hues, 255)], axis=1)[None], cv2.COLOR_HSV2RGB
    )
    for points in people:
        for (start, end), colour in zip(BONES, colours[0].tolist(), strict=True):
            if points[start, 2] > 0 and points[end, 2] > 0:
                ends = [tuple(np.round(points[place, :2]).astype(int).tolist()) for place in (start, end)]
                cv2.line(canvas, *ends, colour, thickness, cv2.LINE_AA)
    return canvas
