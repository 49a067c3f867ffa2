"""Grids of captioned pictures, and PNG files that say how they were made."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from warpcore.files import writing

MARGIN_PX = 4
FONT_SIZE_PX = 12
MAX_CAPTION_LINES = 4
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)


def grid(pictures: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """Pictures row by row, each centred over its caption.

    Args:
        pictures: uint8 (H, W, 3), of any sizes; a column is as wide as its widest picture, a row as its highest high.
        columns: pictures in a row.
        captions: one per picture ("" for none), wrapped to the column; what doesn't fit in four lines is cut.

    Returns:
        uint8 (H, W, 3).
    """
    if not pictures or columns < 1 or (captions is not None and len(captions) != len(pictures)):
        raise ValueError(
            "a grid needs pictures, at least one column and a caption for each picture; got "
            f"{len(pictures)} pictures, {columns} columns, {'no' if captions is None else len(captions)} captions"
        )
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a grid takes uint8 pictures (H, W, 3), got {picture.dtype} {picture.shape}")
    columns = min(columns, len(pictures))
    font = ImageFont.load_default(FONT_SIZE_PX)
    line_height = sum(font.getmetrics())
    widths = [max(picture.shape[1] for picture in pictures[column::columns]) for column in range(columns)]
    lines = [
        _wrap(caption, widths[number % columns], font)
        for number, caption in enumerate(captions or [""] * len(pictures))
    ]
    rows = range(0, len(pictures), columns)
    heights = [max(picture.shape[0] for picture in pictures[row : row + columns]) for row in rows]
    text_heights = [max(map(len, lines[row : row + columns])) * line_height for row in rows]

    width = sum(widths) + MARGIN_PX * (columns + 1)
    height = sum(heights) + sum(text_heights) + MARGIN_PX * (len(rows) + 1)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left = MARGIN_PX * (column + 1) + sum(widths[:column])
        top = MARGIN_PX * (row + 1) + sum(heights[:row]) + sum(text_heights[:row])
        canvas.paste(Image.fromarray(picture), (left + (widths[column] - picture.shape[1]) // 2, top))
        for line_number, line in enumerate(lines[number]):
            draw.text((left, top + heights[row] + line_number * line_height), line, fill=INK, font=font)
    return np.array(canvas)


def _wrap(text: str, width_px: int, font) -> list[str]:
    """The text in lines that fit the width, at most `MAX_CAPTION_LINES`."""
    per_line = max(1, int(width_px / font.getlength("n")))
    lines = textwrap.wrap(text, per_line, max_lines=MAX_CAPTION_LINES, placeholder="…" if per_line > 1 else "")
    return [_cut(line, width_px, font) for line in lines]


def _cut(line: str, width_px: int, font) -> str:
    while line and font.getlength(line) > width_px:
        line = line[:-1]
    return line


def save_png(path: Path | str, picture: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a picture, uint8 (H, W, 3), with `metadata` (any Unicode) in the file, which appears whole or not at all.

    Keys are Latin-1 and at most 79 characters long, as PNG wants them.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(aside, "wb") as file:
            Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_metadata(path: Path | str) -> dict[str, str]:
    """What `save_png` wrote beside the picture."""
    with Image.open(path) as image:
        image.load()
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}
