"""Put sample pictures of runs, or of any folders, side by side: a page for the browser, and sheets.

    python3 tools/compare_runs.py runs/a runs/b compared
    python3 tools/compare_runs.py theirs/checkpoints ours/checkpoints pictures/old compared --size 512
    python3 tools/compare_runs.py runs/a s3://bucket/runs/b compared

Compared are pictures of equal names, sub-folders included; of a run those in its folder `samples`, whose sheets are
taken apart again, so that each prompt stands beside itself. Pictures on S3 are fetched into a temporary folder. A
picture that a folder lacks, or that can't be read, is shown as missing, and counted. OUT gets compare.html, which
holds all that it shows and works without a network (arrow keys for picture and update, digits or Tab to flip between
the folders), and sheet.png, sheet_2.png, ... to pass on.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from families.common.pictures import size_of
from families.common.weight_files import RUN_CONFIG, is_run
from tools.arguments import local_path, positive
from tools.compare_page import Missing, Page, Row
from warpcore.data.images import BadPicture, decode
from warpcore.data.picture_files import UNREAD_EXTENSIONS, LeftOut, extension, is_picture, no_decoder, walk
from warpcore.data.s3_files import fetch, sizes_below
from warpcore.data.samples import PICTURE_EXTENSIONS
from warpcore.data.storage import in_parallel, is_remote
from warpcore.data.tars import clean
from warpcore.errors import UserError, run_script
from warpcore.files import read_bytes
from warpcore.outputs import check_folder
from warpcore.pictures import Cell, grid, read_cells, save_png, shrunk
from warpcore.text import counted, printable

PAGE, SHEET = "compare.html", "sheet"
SHEET_SIDE_PX = 256
"""The longer side of a picture in a sheet, at most."""
SHEET_COLUMNS, SHEET_ROWS = 8, 64
"""Pictures side by side in a sheet, where the folders are fewer; and pictures of each folder in it."""
SHOWN = 3
"""Missing pictures named for each folder."""
SAMPLES = "samples"
"""Where a run has its sample pictures."""


@dataclass(frozen=True)
class Source:
    """Where a folder has a picture: a file, or a part of one."""

    path: Path
    cell: Cell | None


@dataclass(frozen=True)
class Compared:
    """A picture that some of the folders have."""

    update: str
    """The folder that it lies in, or the file of the sheet that it is taken from: what "update" means for runs."""
    prompt: str
    """Its file, or its caption in the sheet."""
    sources: tuple[Source | None, ...]
    """By folder."""

    @property
    def name(self) -> str:
        return f"{self.update}: {self.prompt}" if self.update else self.prompt


def compare_runs(folders: Sequence[Path | str], out: Path, size: int | None = None) -> list[str]:
    """Write the page and the sheets of the pictures in `folders`; lines that tell what was found.

    folders: of this machine, or s3://bucket/prefix.

    size: larger pictures are shrunk to this longer side in the page, in pixels.

    Raises:
        UserError: a folder is not there, or no picture is in two of them.
    """
    left_out, labels = LeftOut(), [str(folder) for folder in folders]
    with TemporaryDirectory() as copies:
        places = [_copied(folder, Path(copies, str(place)), left_out) for place, folder in enumerate(folders)]
        pictures = find_pictures(places, labels, out, left_out)
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=out) as aside:  # a page that is too large leaves no sheets behind
            told = _write(pictures, labels, Path(aside), out, size, left_out)
        for place, label in zip(places, labels, strict=True):
            told = [line.replace(f"{place}/", f"{label.rstrip('/')}/") for line in told]
    return [*told, f"{out / PAGE} ({(out / PAGE).stat().st_size / 1e6:.1f} MB)"]


def _copied(folder: Path | str, place: Path, left_out: LeftOut) -> Path:
    """The folder; of one on S3, a copy of its pictures, of a run of its sample pictures, in `place`."""
    if not is_remote(str(folder)):
        return Path(folder)
    url = f"{str(folder).rstrip('/')}/"
    sizes = sizes_below(url)
    if RUN_CONFIG in sizes and (samples := {name for name in sizes if name.startswith(f"{SAMPLES}/")}):
        sizes, url = {name.removeprefix(f"{SAMPLES}/"): sizes[name] for name in samples}, f"{url}{SAMPLES}/"
    wanted = []
    for name, size in sizes.items():
        if {"", ".", ".."} & {*name.split("/")}:
            left_out.add("not the name of a file", f"{url}{name}")
        elif extension(Path(name)) in (*PICTURE_EXTENSIONS, *UNREAD_EXTENSIONS):
            wanted.append((f"{url}{name}", place / name, size))
    for _ in in_parallel(fetch, wanted):
        pass
    place.mkdir(parents=True, exist_ok=True)
    return place


def _write(
    pictures: Sequence[Compared], labels: Sequence[str], aside: Path, out: Path, size: int | None, left_out: LeftOut
) -> list[str]:
    """Write the page, and behind it the sheets, which are made in the folder `aside`."""
    read, missing, number = _Reader(left_out, len(labels)), [[] for _ in labels], 0
    with Page(out / PAGE, labels, size) as page:
        for number, rows in enumerate(_groups(pictures, SHEET_ROWS), start=1):
            cells, captions = [], []
            for row in rows:
                shown = [read(source) for source in row.sources]
                for lacking, one in zip(missing, shown, strict=True):
                    if isinstance(one, Missing):
                        lacking.append(row.name)
                page.add(Row(row.update, row.prompt, shown))
                cells += _for_sheet(shown)
                captions += [f"{label}: {row.name}" for label in labels]
            columns = len(labels) * max(1, SHEET_COLUMNS // len(labels))
            save_png(_sheet(aside, number), grid(cells, columns, [clean(caption) for caption in captions]))
    for made in range(1, number + 1):
        os.replace(_sheet(aside, made), _sheet(out, made))
    while (old := _sheet(out, number := number + 1)).is_file():  # of an earlier comparison, of more pictures
        old.unlink()
    return list(_report(pictures, labels, missing, left_out))


def _sheet(out: Path, number: int) -> Path:
    return out / f"{SHEET}{f'_{number}' if number > 1 else ''}.png"


def find_pictures(folders: Sequence[Path], labels: Sequence[str], out: Path, left_out: LeftOut) -> list[Compared]:
    """What the folders hold, by update and prompt, numbers in names in their order.

    Raises:
        UserError: as `compare_runs`.
    """
    files = [_files(folder, out, left_out) for folder in folders]
    found = [
        compared
        for name in sorted({name for names in files for name in names}, key=_by_numbers)
        for compared in _pictures(name, [names.get(name) for names in files], left_out)
    ]
    if not any(sum(source is not None for source in one.sources) > 1 for one in found):
        has = "; ".join(f"{label} has {_some(list(names))}" for label, names in zip(labels, files, strict=True))
        raise UserError(f"no picture has the same name in two of the folders: {printable(has)}")
    return found


def _files(folder: Path, out: Path, left_out: LeftOut) -> dict[str, Path]:
    """The pictures in a folder by their names in it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of pictures")
    if is_run(folder) and (folder / SAMPLES).is_dir():
        folder = folder / SAMPLES
    inside = [path for files in walk(folder, left_out, out) for path in files]
    for path in inside:
        if extension(path) in UNREAD_EXTENSIONS:
            left_out.add(no_decoder(path), path)
    return {path.relative_to(folder).as_posix(): path for path in inside if is_picture(path)}


def _pictures(name: str, paths: Sequence[Path | None], left_out: LeftOut) -> Iterator[Compared]:
    """The pictures in the files of one name: those of a sheet where all of the files say where these are."""
    cells = [None if path is None else _cells(path, left_out) for path in paths]
    if any(path is not None and found is None for path, found in zip(paths, cells, strict=True)):
        update, _, prompt = name.rpartition("/")
        yield Compared(update, prompt, tuple(path and Source(path, None) for path in paths))
        return
    for prompt in dict.fromkeys(prompt for found in cells if found for prompt in found):
        sources = [
            Source(path, found[prompt]) if found and prompt in found else None
            for path, found in zip(paths, cells, strict=True)
        ]
        yield Compared(name.rpartition(".")[0], prompt, tuple(sources))


def _cells(path: Path, left_out: LeftOut) -> dict[str, Cell] | None:
    """See `numbered`; None where a sheet does not tell of its pictures."""
    try:
        cells = read_cells(path)
    except (OSError, UserError, Image.DecompressionBombError):  # reading its pixels tells what is wrong
        return None
    except ValueError:
        left_out.add("list of pictures in a sheet, which is shown as a whole (damaged)", path)
        return None
    return numbered(cells or ()) or None


def numbered(cells: Iterable[Cell]) -> dict[str, Cell]:
    """The pictures in a sheet by caption, those of equal captions numbered: `a fox`, `a fox (2)`."""
    seen, found = Counter(), {}
    for cell in cells:
        seen[cell.caption] += 1
        found[f"{cell.caption} ({seen[cell.caption]})" if seen[cell.caption] > 1 else cell.caption] = cell
    return found


class _Reader:
    """Reads pictures; keeps the file that each folder had last, as a sheet holds many of them."""

    def __init__(self, left_out: LeftOut, num_folders: int):
        self.left_out = left_out
        self.decoded = lru_cache(num_folders)(self._decoded)

    def __call__(self, source: Source | None) -> np.ndarray | Missing:
        """uint8 (H, W, 3), or why there is none."""
        if source is None:
            return Missing("missing")
        pixels = self.decoded(source.path)
        if source.cell is None or isinstance(pixels, Missing):
            return pixels
        _, left, top, width, height = source.cell
        part = pixels[top : top + height, left : left + width]
        return part if part.shape[:2] == (height, width) else Missing("its place is not in the sheet")

    def _decoded(self, path: Path) -> np.ndarray | Missing:
        try:
            return np.array(decode(read_bytes(path), size_of(path)).pixels)
        except (BadPicture, UserError) as error:
            reason = str(error).removeprefix(f"{path} ")
            self.left_out.add(f"unreadable ({reason})", path)
            return Missing(reason)


def _groups(items: Sequence[Compared], size: int) -> Iterator[Sequence[Compared]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _for_sheet(shown: Sequence[np.ndarray | Missing]) -> Iterator[np.ndarray]:
    """The pictures of a row at a size for the sheet; what is missing is a dark square."""
    for picture in shown:
        if isinstance(picture, Missing):
            yield np.full((SHEET_SIDE_PX // 4,) * 2 + (3,), 64, np.uint8)
        else:
            yield shrunk(picture, SHEET_SIDE_PX)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key for sorting: `2` before `10`."""
    parts = re.split("([0-9]+)", name)
    return [(int(part[:18]), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _report(
    pictures: Sequence[Compared], labels: Sequence[str], missing: Sequence[list[str]], left_out: LeftOut
) -> Iterator[str]:
    updates, prompts = ({getattr(one, kind) for one in pictures} for kind in ("update", "prompt"))
    kinds = f"{counted(len(updates), 'update')}, {counted(len(prompts), 'prompt')}"
    yield f"{counted(len(pictures), 'picture')} of {len(labels)} folders ({kinds})"
    for label, names in zip(labels, missing, strict=True):
        lacks = f", {len(names)} missing: {_some(names)}" if names else ""
        yield printable(f"  {label}: {len(pictures) - len(names)}{lacks}")
    if left_out:
        yield str(left_out)


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=lambda text: text if text.startswith("s3://") else local_path(text),
        metavar="FOLDER", help="a run, or a folder of pictures; of this machine, or s3://bucket/prefix",
    )  # fmt: skip
    parser.add_argument("out", type=local_path, metavar="OUT", help="folder for the page and the sheets")
    parser.add_argument("--size", type=positive, metavar="PX", help="shrink larger pictures to this longer side")
    parser.add_argument("--overwrite", action="store_true", help="write into OUT even if it holds something")
    given = parser.parse_args()
    if len(given.folders) < 2:
        raise UserError("name two folders or more, and behind them OUT, a folder for the page and the sheets")
    check_folder(given.out, "the page and the sheets")
    if given.out.is_dir() and any(given.out.iterdir()) and not given.overwrite:
        raise UserError(f"{given.out} is not empty: name a new folder behind those to compare, or give --overwrite")
    print("\n".join(compare_runs(given.folders, given.out, given.size)))


if __name__ == "__main__":
    run_script(main)
