"""How well a ControlNet of the mini cascade follows given edges.

    python3 benchmarks/learning.py --run runs/quickstart_controlnet

Sentences that the demo set never uses are drawn from the same noise without and with the ControlNet, which sees the
edges of their scenes; in a third way, guidance leads towards these edges and not only towards the sentence. The score
is the F1 of the drawing's edges against the given ones, at 128 px; an edge counts as found if there is one within 2 px
on the other side. True pictures, rebuilt from their latents, say how far a perfect ControlNet could come.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.scorer import sentences
from families.common.scoring import SIDE_PX, Scored
from modules.filters.canny import CannyFilter
from tools.demo_scenes import SEEN_PAIRS, render

TOLERANCE_PX = 2


def edges_of(picture: np.ndarray) -> np.ndarray:
    """Where a picture, uint8 (H, W, 3) of any size, has edges at `SIDE_PX`: bool (SIDE_PX, SIDE_PX)."""
    picture = cv2.resize(picture, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
    return CannyFilter(resize=None)(_batch([picture])).condition[0, 0].numpy() > 0.5


def agreement(found: np.ndarray, given: np.ndarray, tolerance_px: float = TOLERANCE_PX) -> float:
    """F1 of edges against given ones, bool (H, W) both; one matches that is at most `tolerance_px` from another."""

    def share_near(of: np.ndarray, to: np.ndarray) -> float:
        if not of.any() or not to.any():
            return float(of.any() == to.any())
        distance = cv2.distanceTransform((~to).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return float((distance[of] <= tolerance_px).mean())

    precision, recall = share_near(found, given), share_near(given, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _batch(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def report(drawing: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about the ControlNet of the settings; returns what to show, in how many columns, and captions."""
    cases = [case for case in sentences(4 * samples, SEEN_PAIRS, seed) if case[0].width == case[0].height][:samples]
    pictures, texts = [render(scene) for scene, _ in cases], [text for _, text in cases]
    ways = drawing.controlled(pictures, texts, seed)
    given = [edges_of(picture) for picture in pictures]
    rebuilt = {f"rebuilt: {way}": made for way, made in drawing.rebuild(pictures, texts).items()}
    for way, made in (ways | rebuilt).items():
        score = np.mean([agreement(edges_of(picture), edges) for picture, edges in zip(made, given, strict=True)])
        print(f"{way:28}{100 * score:6.1f} % F1 of edges within {TOLERANCE_PX} px")
    shown = [np.repeat(edges[..., None] * np.uint8(255), 3, axis=2) for edges in given]
    columns = {"picture": pictures, "condition": shown} | ways
    rows = range(min(6, len(texts)))
    cells = [cv2.resize(column[row], (SIDE_PX, SIDE_PX)) for row in rows for column in columns.values()]
    captions = [texts[row] if name == "picture" else name for row in rows for name in columns]
    return cells, len(columns), captions
