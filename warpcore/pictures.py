"""Grids of captioned pictures, and PNG files that say how they were made."""

import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from warpcore.clips import strip
from warpcore.files import open_to_read, writing
from warpcore.redaction import redact
from warpcore.safe_json import parse_json

MARGIN_PX = 4
FONT_SIZE_PX = 12
MAX_CAPTION_LINES = 4
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)
CELLS = "cells"
"""The key, in the metadata of a PNG, of where the pictures in a grid are."""


class Cell(NamedTuple):
    """Where a picture is in a grid, in pixels, and its whole caption."""

    caption: str
    left: NonNegativeInt
    top: NonNegativeInt
    width: PositiveInt
    height: PositiveInt


def grid(pictures: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """The picture, uint8 (H, W, 3), that `grid_and_cells` gives."""
    return grid_and_cells(pictures, columns, captions)[0]


def grid_and_cells(
    pictures: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None
) -> tuple[np.ndarray, list[Cell]]:
    """Pictures row by row, each centred over its caption.

    Args:
        pictures: uint8 (H, W, 3), of any sizes; a column is as wide as its widest picture, a row as its highest high.
            Clips (T, H, W, 3) are pictures of some of their frames, side by side.
        columns: pictures in a row.
        captions: one per picture ("" for none), wrapped to the column; what doesn't fit in four lines is cut.

    Returns:
        uint8 (H, W, 3), and where each picture is in it.
    """
    if not pictures or columns < 1 or (captions is not None and len(captions) != len(pictures)):
        raise ValueError(
            "a grid needs pictures, at least one column and a caption for each picture; got "
            f"{len(pictures)} pictures, {columns} columns, {'no' if captions is None else len(captions)} captions"
        )
    pictures = [strip(picture) if picture.ndim == 4 else picture for picture in pictures]
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a grid takes uint8 pictures (H, W, 3), got {picture.dtype} {picture.shape}")
    columns = min(columns, len(pictures))
    font = ImageFont.load_default(FONT_SIZE_PX)
    line_height = sum(font.getmetrics())
    widths = [max(picture.shape[1] for picture in pictures[column::columns]) for column in range(columns)]
    captions = captions or [""] * len(pictures)
    lines = [_wrap(caption, widths[number % columns], font) for number, caption in enumerate(captions)]
    rows = range(0, len(pictures), columns)
    heights = [max(picture.shape[0] for picture in pictures[row : row + columns]) for row in rows]
    text_heights = [max(map(len, lines[row : row + columns])) * line_height for row in rows]

    width = sum(widths) + MARGIN_PX * (columns + 1)
    height = sum(heights) + sum(text_heights) + MARGIN_PX * (len(rows) + 1)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw, cells = ImageDraw.Draw(canvas), []
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left = MARGIN_PX * (column + 1) + sum(widths[:column])
        top = MARGIN_PX * (row + 1) + sum(heights[:row]) + sum(text_heights[:row])
        cell = Cell(captions[number], left + (widths[column] - picture.shape[1]) // 2, top, *picture.shape[1::-1])
        canvas.paste(Image.fromarray(picture), (cell.left, cell.top))
        cells.append(cell)
        for line_number, line in enumerate(lines[number]):
            draw.text((left, top + heights[row] + line_number * line_height), line, fill=INK, font=font)
    return np.array(canvas), cells


def _wrap(text: str, width_px: int, font) -> list[str]:
    """The text in lines that fit the width, at most `MAX_CAPTION_LINES`."""
    per_line = max(1, int(width_px / font.getlength("n")))
    lines = textwrap.wrap(text, per_line, max_lines=MAX_CAPTION_LINES, placeholder="…" if per_line > 1 else "")
    return [_cut(line, width_px, font) for line in lines]


def _cut(line: str, width_px: int, font) -> str:
    while line and font.getlength(line) > width_px:
        line = line[:-1]
    return line


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), made smaller where its longer side is longer than `side` px."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(image)


def save_png(path: Path | str, picture: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a picture, uint8 (H, W, 3), with `metadata` (any Unicode) in the file, which appears whole or not at all.

    Keys are Latin-1 and at most 79 characters long, as PNG wants them. Credentials in the values are hidden.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, redact(str(value)))
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


def cells_metadata(cells: Iterable[Cell]) -> dict[str, str]:
    """What `read_cells` finds in a PNG that `save_png` wrote with it."""
    return {CELLS: json.dumps(list(cells))}


def read_cells(path: Path | str) -> list[Cell] | None:
    """Where the pictures in a grid are; None where the PNG does not say it.

    Raises:
        ValueError: what it says is damaged.
        OSError: it is no PNG, or can't be read.
    """
    with open_to_read(path) as file:
        return cells_in(file)


def cells_in(file: BinaryIO) -> list[Cell] | None:
    """`read_cells` of an open file, of which what comes before its pixels is read."""
    with Image.open(file, formats=("PNG",)) as image:
        text = image.info.get(CELLS)
    return None if text is None else TypeAdapter(list[Cell]).validate_python(parse_json(str(text)))
