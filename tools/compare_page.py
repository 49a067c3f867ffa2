"""A page that shows pictures side by side: one file that needs no other, and no network.

Names and captions are text that anyone may have written: they are escaped, and the page's policy lets the browser run
nothing but the script below, and load nothing at all.
"""

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Self

import numpy as np
from PIL import Image

from warpcore.data.tars import clean
from warpcore.errors import UserError
from warpcore.files import writing
from warpcore.pictures import shrunk

MAX_BYTES = 2**29
"""A browser takes no longer page than about that."""
SMALL_PX = 256
"""Pictures up to this longer side are enlarged without smoothing, so that each pixel is seen."""

STYLE = """
:root { color-scheme: dark; font: 15px/1.4 system-ui, sans-serif; background: #202124; color: #e8eaed; }
body { margin: 0 1rem 1rem; }
header { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; align-items: baseline; padding: .5rem 0; }
h1, h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
#keys { margin: 0; color: #9aa0a6; font-size: .85rem; }
kbd { border: 1px solid #5f6368; border-radius: 3px; padding: 0 .3em; }
.pictures { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .75rem; }
figure { margin: .4rem 0 0; min-width: 0; text-align: center; }
figcaption { overflow-wrap: anywhere; }
img { width: 100%; height: calc(100vh - 8.5rem); object-fit: contain; cursor: pointer; }
.small { image-rendering: pixelated; }
.missing p { height: calc(100vh - 8.5rem); margin: 0; display: grid; place-content: center; background: #303134; }
.list section { margin-bottom: 2rem; }
.list img, .list .missing p { height: 16rem; }
.one section:not(.current), .alone figure:not(.shown) { display: none; }
.real img { width: auto; height: auto; max-width: none; object-fit: none; }
.real figure { overflow: auto; }
"""

SCRIPT = """
const rows = [...document.querySelectorAll("section")], body = document.body;
const folders = rows[0].querySelectorAll("figure").length;
let row = 0, alone = null;  // alone: the folder that is shown by itself, else null

function show(place) {
  row = Math.min(Math.max(place, 0), rows.length - 1);
  rows.forEach((one, number) => one.classList.toggle("current", number === row));
  body.classList.toggle("alone", alone !== null);
  for (const figure of document.querySelectorAll("figure"))
    figure.classList.toggle("shown", Number(figure.dataset.folder) === alone);
  document.getElementById("place").textContent = `${row + 1} / ${rows.length}`;
  location.replace("#" + (row + 1) + (alone === null ? "" : "." + (alone + 1)));
  if (body.classList.contains("list")) rows[row].scrollIntoView({block: "nearest"});
}

function sameprompt(step) {  // the place of the same prompt in the next update that has it
  for (let place = row + step; rows[place]; place += step)
    if (rows[place].dataset.prompt === rows[row].dataset.prompt) return place;
  return row;
}

function flip(step) {
  alone = alone === null ? (step > 0 ? 0 : folders - 1) : (alone + step + folders) % folders;
  show(row);
}

function toggle(...names) {
  names.forEach(name => body.classList.toggle(name));
  show(row);
}

const keys = {
  ArrowRight: () => show(row + 1), ArrowLeft: () => show(row - 1),
  ArrowDown: () => show(sameprompt(1)), ArrowUp: () => show(sameprompt(-1)),
  Home: () => show(0), End: () => show(rows.length - 1),
  Tab: event => flip(event.shiftKey ? -1 : 1),
  0: () => { alone = null; show(row); }, Escape: () => { alone = null; show(row); },
  a: () => toggle("one", "list"), z: () => toggle("real"),
};

function read() {  // #ROW, or #ROW.FOLDER
  const [place, folder] = location.hash.slice(1).split(".").map(Number);
  alone = folder >= 1 && folder <= folders ? folder - 1 : null;
  show((place || 1) - 1);
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const digit = /^[1-9]$/.test(event.key) && Number(event.key);
  if (digit && digit <= folders) { alone = digit - 1; show(row); }
  else if (Object.hasOwn(keys, event.key)) keys[event.key](event);
  else return;
  event.preventDefault();
});
addEventListener("click", event => {
  const figure = event.target.closest("figure");
  if (!figure) return;
  alone = alone === null ? Number(figure.dataset.folder) : null;
  show(rows.indexOf(figure.closest("section")));
});
addEventListener("hashchange", read);
body.classList.replace("list", "one");
read();
"""

_KEYS = """<kbd>←</kbd> <kbd>→</kbd> picture, <kbd>↑</kbd> <kbd>↓</kbd> update, <kbd>1</kbd> <kbd>2</kbd> ... or \
<kbd>Tab</kbd> one folder alone, <kbd>0</kbd> side by side, <kbd>a</kbd> all rows, <kbd>z</kbd> real size"""


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
        self._write(
            f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n<style>{STYLE}</style>\n'
            f'<body class="list">\n<header><h1>{_text(title)}</h1><span id="place"></span>'
            f'<p id="keys">{_KEYS}</p></header>\n<main>\n'
        )
        return self

    def __exit__(self, kind: type | None, *about) -> None:
        try:
            if kind is None:
                self._write(f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")
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


def _policy() -> str:
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (STYLE, SCRIPT)]
    return f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
