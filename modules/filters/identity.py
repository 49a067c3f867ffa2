"""Whose faces a picture shows, and where."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.filters.base import Filter, Filtered
from modules.filters.faces import check_files, find_faces, identify

CELL_PX = 32
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]])


class IdentityFilter(Filter):
    """A map with a position for each 32 px: the recogniser's vector where a face is, 0 elsewhere.

    max_faces: per picture. p_drop: share of the faces left out. p_full: share of the pictures of one face in which it
    fills the map, so that the ControlNet learns to place it. models_path: folder of `det_10g.onnx` and
    `w600k_r50.onnx`.
    """

    channels = 512
    least_side_px = CELL_PX
    when_drawing: Mapping[str, Any] = {"p_drop": 0.0, "p_full": 0.0}

    def __init__(
        self,
        max_faces: int = 4,
        p_drop: float = 0.05,
        p_full: float = 0.3,
        models_path: Path = Path("models/buffalo_l"),
    ):
        self.max_faces, self.p_drop, self.p_full, self.models_path = max_faces, p_drop, p_full, Path(models_path)
        check_files(self.models_path)

    def apply(self, images: Tensor, seeds: Sequence[int]) -> Filtered:
        images = images.cpu()
        batch, _, height, width = images.shape
        rows, columns = height // CELL_PX, width // CELL_PX
        condition, pictures = torch.zeros(batch, self.channels, rows, columns), images.clone()
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            picture = np.ascontiguousarray(images[i].mul(255).round().byte().permute(1, 2, 0).numpy())
            faces = find_faces(picture, self.models_path, self.max_faces)
            for number, vector in enumerate(identify(picture, faces, self.models_path)):
                dropped, full = rng.random() < self.p_drop, rng.random() < self.p_full
                if dropped:
                    continue
                left, top, right, bottom = _cells(faces.boxes[number], rows, columns)
                if full and len(faces.boxes) == 1:
                    left, top, right, bottom = 0, 0, columns, rows
                condition[i, :, top:bottom, left:right] = torch.from_numpy(vector)[:, None, None]
                shown = pictures[i, :, top * CELL_PX : bottom * CELL_PX, left * CELL_PX : right * CELL_PX]
                shown += COLOURS[number % len(COLOURS), :, None, None]
                shown /= 2
        return Filtered(condition, pictures)


def _cells(box: np.ndarray, rows: int, columns: int) -> tuple[int, int, int, int]:
    """The cells (left, top, right, bottom) that a box in px covers, at least one."""
    left, top, right, bottom = np.round(box / CELL_PX).astype(int).tolist()
    left, top = min(max(left, 0), columns - 1), min(max(top, 0), rows - 1)
    return left, top, max(min(right, columns), left + 1), max(min(bottom, rows), top + 1)
