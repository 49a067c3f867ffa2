"""Faces, and whose they are: insightface's detector (SCRFD, arXiv:2105.04714) and recogniser (ArcFace,
arXiv:1801.07698), as ONNX files run by onnxruntime on the CPU.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

DETECTOR, RECOGNISER = "det_10g.onnx", "w600k_r50.onnx"
HOW_TO_GET = (
    "Install onnxruntime (pip install onnxruntime), and unpack insightface's models "
    "(https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip, for research only)"
)
DETECTION_SIDE_PX = 320
STRIDES_PX = (8, 16, 32)
ANCHORS = 2  # per position
LEAST_SCORE, MOST_OVERLAP = 0.5, 0.4
FACE_SIDE_PX = 112
FACE_POINTS_PX = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where the recogniser expects eyes, nose and corners of the mouth."""


class Faces(NamedTuple):
    """Of N faces: boxes (N, 4) left, top, right, bottom and points (N, 5, 2) x, y, all in px."""

    boxes: np.ndarray
    points: np.ndarray


def check_files(folder: Path) -> None:
    """Raise ValueError, with what to do, where onnxruntime or a model is missing."""
    missing = [str(folder / name) for name in (DETECTOR, RECOGNISER) if not (folder / name).is_file()]
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        missing.append("onnxruntime")
    if missing:
        raise ValueError(f"faces can't be recognised without {' and '.join(missing)}. {HOW_TO_GET} into {folder}")


def find_faces(picture: np.ndarray, folder: Path, most: int) -> Faces:
    """The `most` largest, most central faces in a picture, uint8 RGB (H, W, 3)."""
    height, width = picture.shape[:2]
    scale = DETECTION_SIDE_PX / max(height, width)
    small = cv2.resize(picture, (int(width * scale), int(height * scale)))
    canvas = np.zeros((DETECTION_SIDE_PX, DETECTION_SIDE_PX, 3), np.float32)
    canvas[: small.shape[0], : small.shape[1]] = small
    outputs = _run(folder / DETECTOR, (canvas - 127.5) / 128)
    scores, boxes, points = decoded(outputs)
    likely = scores > LEAST_SCORE
    scores, boxes, points = scores[likely], boxes[likely] / scale, points[likely] / scale
    corner_and_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = np.array(cv2.dnn.NMSBoxes(corner_and_size, scores, LEAST_SCORE, MOST_OVERLAP), int)
    boxes, points = boxes[kept], points[kept]
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - (width / 2, height / 2)
    prominence = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - 2 * (offset**2).sum(axis=1)
    order = np.argsort(-prominence)[:most]
    return Faces(boxes[order], points[order])


def identify(picture: np.ndarray, faces: Faces, folder: Path) -> np.ndarray:
    """(N, 512) float32: whose faces they are, vectors of length 1."""
    vectors = np.zeros((len(faces.boxes), 512), np.float32)
    for vector, points in zip(vectors, faces.points, strict=True):
        face = cv2.warpAffine(picture, similarity(points, FACE_POINTS_PX), (FACE_SIDE_PX, FACE_SIDE_PX))
        vector[:] = _run(folder / RECOGNISER, (face.astype(np.float32) - 127.5) / 127.5)[0].reshape(-1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def decoded(outputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (A,), boxes (A, 4) and points (A, 5, 2) in px of all anchors, from the detector's nine outputs.

    Those are scores, distances of the box's sides and offsets of the points, each for the three strides.
    """
    scores, boxes, points = [], [], []
    for level, stride in enumerate(STRIDES_PX):
        side = DETECTION_SIDE_PX // stride
        y, x = np.mgrid[:side, :side]
        places = np.stack([x, y], axis=-1).reshape(-1, 1, 2).repeat(ANCHORS, axis=1).reshape(-1, 2) * stride
        score, sides, offsets = (outputs[level + 3 * kind].reshape(len(places), -1) for kind in range(3))
        scores.append(score[:, 0])
        boxes.append(np.concatenate([places - sides[:, :2] * stride, places + sides[:, 2:] * stride], axis=1))
        points.append(places[:, None] + offsets.reshape(-1, 5, 2) * stride)
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(points)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scale and shift (2, 3) that brings points (N, 2) nearest to others, in the sense of least squares."""
    x, y = source.T
    zeros, ones = np.zeros_like(x), np.ones_like(x)
    rows = np.concatenate([np.stack([x, -y, ones, zeros], axis=1), np.stack([y, x, zeros, ones], axis=1)])
    a, b, right, down = np.linalg.lstsq(rows, target.T.reshape(-1), rcond=None)[0]
    return np.array([[a, -b, right], [b, a, down]])


def _run(path: Path, picture: np.ndarray) -> list[np.ndarray]:
    """The outputs of a model for a picture (H, W, 3)."""
    session = _session(str(path))
    return session.run(None, {session.get_inputs()[0].name: picture.transpose(2, 0, 1)[None].astype(np.float32)})


@cache
def _session(path: str) -> Any:
    """One per process and file; on one thread, as there are several workers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
