"""Pages for the browser. Each is a few plain files in this folder: HTML that names its styles and scripts.

A page is served as it is, or written as one file that holds all of them and its data. What it shows is text that
anyone may have written (captions, names of files): scripts put it in with `textContent`, and the page's policy lets
the browser run and load nothing but what is named here.

uPlot (MIT, `uPlot.LICENSE`) draws the curves.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from warpcore.files import read_bytes

FOLDER = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
"""What the files of pages are, as HTTP says it."""
DATA = '<script type="application/json" id="data"></script>'
"""Where a page's data go; the page is served with this element empty."""
_CHARSET = '<meta charset="utf-8">'
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')


@cache
def page_file(name: str) -> str:
    """The content of a file of this folder."""
    return read_bytes(FOLDER / name).decode()


def names_in(name: str) -> list[str]:
    """The files that a page names."""
    return _STYLE.findall(page_file(name)) + _SCRIPT.findall(page_file(name))


def as_json(data: Any) -> str:
    """JSON that can stand in HTML, whatever texts are in it: no `<` is left. Raises ValueError for NaN."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def self_contained(name: str, data: Any, pictures: str = "data:") -> str:
    """The page `name`, such as `runs.html`, as one file with its styles, its scripts and `data`.

    Its script reads them: `JSON.parse(document.getElementById("data").textContent)`.

    Args:
        data: whatever JSON can say; there is no NaN in JSON. None: the page has no data of this kind.
        pictures: where pictures and clips may come from, as a Content-Security-Policy says it.
    """
    allowed: dict[str, list[str]] = {"style": [], "script": []}

    def inside(kind: str, file: re.Match) -> str:
        text = page_file(file[1])
        allowed[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{kind}>{text}</{kind}>"

    page = _STYLE.sub(lambda file: inside("style", file), page_file(name))
    page = _SCRIPT.sub(lambda file: inside("script", file), page)
    sources = " ".join(f"{kind}-src {' '.join(hashes)};" for kind, hashes in allowed.items() if hashes)
    policy = f"default-src 'none'; img-src {pictures}; media-src {pictures}; {sources}"
    page = page.replace(_CHARSET, f'{_CHARSET}\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    if data is None:
        return page
    before, found, behind = page.partition(DATA)
    if not found:
        raise ValueError(f"{name} has no place for its data: {DATA}")
    return f"{before}{DATA.removesuffix('</script>')}{as_json(data)}</script>{behind}"
