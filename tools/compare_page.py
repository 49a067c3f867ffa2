"""A page that shows pictures side by side: one file that needs no other, and no network.

Names and captions are text that anyone may have written: they are escaped, and the page's policy lets the browser run
nothing but the page's own scripts, and load nothing at all.
"""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Self

import numpy as np
from PIL import Image

from tools.pages import self_contained
from warpcore.data.tars import clean
from warpcore.errors import UserError
from warpcore.files import writing
from warpcore.pictures import shrunk

MAX_BYTES = 2**29
"""A browser takes no longer page than about that."""
SMALL_PX = 256
"""Pictures up to this longer side are enlarged without smoothing, so that each pixel is seen."""
PAGE = "compare.html"


@dataclass(frozen=True)
class Missing:
    """There is no picture."""

    reason: str


@dataclass(frozen=True)
class Row:
    """What stands side by side: of each folder a picture, uint8 (H, W, 3), or why there is none."""

    update: str
    prompt: str
    pictures: Sequence[np.ndarray | Missing]


class Page:
    """Writes the page row by row; it appears whole at the end of the `with` statement, or not at all.

    Args:
        labels: names of the folders. size: larger pictures are shrunk to this longer side, in pixels.
    """

    def __init__(self, path: Path, labels: Sequence[str], size: int | None = None):
        self.path, self.labels, self.size = path, labels, size
        self.bytes_written = self.rows = 0
        self.prompts: dict[str, int] = {}
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file: IO[str]

    def __enter__(self) -> Self:
        self._writing = writing(self._aside, "w")
        self._file = self._writing.__enter__()
        title = " | ".join(self.labels)
        head, _, self._end = self_contained(PAGE, None).partition("</main>")
        for tag in ("title", "h1"):
            head = head.replace(f"<{tag}></{tag}>", f"<{tag}>{_text(title)}</{tag}>")
        self._write(head)
        return self

    def __exit__(self, kind: type | None, *about) -> None:
        try:
            if kind is None:
                self._write(f"</main>{self._end}")
            self._writing.__exit__(kind, *about)
            if kind is None:
                os.replace(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """Raises UserError where the page gets too large for a browser."""
        prompt = self.prompts.setdefault(row.prompt, len(self.prompts))
        self.rows += 1
        heading = f"{row.update} · {row.prompt}" if row.update else row.prompt
        figures = "".join(self._figure(*one) for one in enumerate(zip(self.labels, row.pictures, strict=True)))
        self._write(f'<section data-prompt="{prompt}"><h2>{_text(heading)}</h2><div class="pictures">{figures}</div>')
        self._write("</section>\n")

    def _figure(self, folder: int, shown: tuple[str, np.ndarray | Missing]) -> str:
        label, picture = shown
        caption = f"<figcaption>{folder + 1}: {_text(label)}</figcaption>"
        if isinstance(picture, Missing):
            return f'<figure class="missing" data-folder="{folder}"><p>{_text(picture.reason)}</p>{caption}</figure>'
        picture = picture if self.size is None else shrunk(picture, self.size)
        height, width = picture.shape[:2]
        small = ' class="small"' if max(height, width) <= SMALL_PX else ""
        return (
            f'<figure data-folder="{folder}"><img{small} width="{width}" height="{height}" alt="{_text(label)}" '
            f'src="data:image/png;base64,{_png(picture)}">{caption}</figure>'
        )

    def _write(self, text: str) -> None:
        self.bytes_written += len(text.encode())
        if self.bytes_written > MAX_BYTES:
            raise UserError(
                f"{self.path} would have more than {MAX_BYTES >> 20} MiB, too many for a browser, with {self.rows} "
                "rows of pictures: shrink them, as with --size 512, or compare folders of fewer"
            )
        self._file.write(text)


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _text(text: str) -> str:
    """Text as HTML; names of files need not be text."""
    return escape(clean(text).replace("\0", "\ufffd"))
