"""Show training runs in the browser: curves, sample pictures, configurations and notes, also while they go.

    python3 tools/runs.py                       # of the folder runs
    python3 tools/runs.py /scratch/runs --port 8080
    python3 tools/runs.py s3://bucket/runs
    python3 tools/runs.py runs --export shown   # files that need no server: open shown/index.html

The page is served to this machine alone. From another one: ssh -L 8037:127.0.0.1:8037 MACHINE, and open
http://127.0.0.1:8037 there. Runs may lie in sub-folders; nothing is written to them. Ctrl-C ends it.
"""

import argparse
from collections.abc import Set
from contextlib import suppress
from functools import partial
from pathlib import Path

from tools import pages
from tools.arguments import local_path, positive
from tools.run_places import LocalRuns, RunPlace, S3Runs
from tools.run_reader import TYPES, Run, Runs
from tools.run_server import PAGE, Server, file_parts, overview
from warpcore.data import storage
from warpcore.errors import UserError, run_script
from warpcore.files import write_whole, writing
from warpcore.outputs import check_folder
from warpcore.text import counted

PORT = 8037
PICTURES = "picture"
"""The folder of the sample pictures in an export, one in it for each run."""
EXPORTED_BUCKETS = 1_000
"""Of each curve."""


def place_of(folder: str) -> RunPlace:
    """Raises UserError where there is nothing to read."""
    place = S3Runs(folder) if folder.startswith("s3://") else LocalRuns(storage.local_path(folder))
    place.files()
    return place


def serve(place: RunPlace, port: int | None) -> None:
    """Until Ctrl-C. port: None: PORT, or another where that is in use."""
    try:
        server = Server(place, PORT if port is None else port)
    except OSError as error:
        if port is not None:
            raise UserError(f"--port {port} can't be used ({error.strerror}): give another one") from None
        server = Server(place, 0)
    with server:
        print(f"{counted(len(server.runs.all()), 'run')} of {place.name} at {server.url} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def export(place: RunPlace, out: Path) -> str:
    """Write the page, with all that it shows, to a folder; a line that tells of it."""
    runs = Runs(place)
    written: set[Path] = set()
    shown = [_exported(place, run, out, written) for run in runs.all()]
    if not shown:
        raise UserError(f"{place.name} holds no run (a folder with a config.yaml): name a folder of runs")
    out.mkdir(parents=True, exist_ok=True)
    # The overview comes last: it knows the metrics that were found on the way.
    data = overview(runs) | {"exported": {str(run.number): one for run, one in zip(runs.all(), shown, strict=True)}}
    page = pages.self_contained(PAGE, data, pictures="'self' file: data:")
    write_whole(out / "index.html", page)
    _remove_others(out / PICTURES, written)
    return f"{counted(len(shown), 'run')} in {out / 'index.html'} ({len(page) / 1e6:.1f} MB) and their sample pictures"


def _remove_others(pictures: Path, written: Set[Path]) -> None:
    """Of an earlier export into the same folder: sample pictures that this page does not show."""
    for file in pictures.glob("*/*"):
        if file not in written and file.parent.name.isdecimal() and file.suffix in TYPES and file.stem.isdecimal():
            file.unlink()
            with suppress(OSError):  # something else is in the folder
                file.parent.rmdir()


def _exported(place: RunPlace, run: Run, out: Path, written: set[Path]) -> dict:
    """What the page asks a server for, and the pictures beside it, whose files are added to those `written`."""
    run.metrics.column("loss")  # which finds the other names
    curves = {
        name: {by: run.metrics.curve(name, by == "time", EXPORTED_BUCKETS) for by in ("update", "time")}
        for name in run.metrics.names
    }
    sheets = {}
    for update in [one["update"] for one in run.samples()]:
        with suppress(LookupError):  # it vanished since it was listed, which the page says
            sheets[str(update)] = run.sheet(update)
    for file in (file for sheet in sheets.values() for file in (sheet["file"], sheet["clip"]) if file):
        try:
            name, _, size = run.picture(file)
        except LookupError:
            continue
        target = out / PICTURES / str(run.number) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target, "wb") as copy:
            copy.writelines(file_parts(place, name, size))
        written.add(target)
    return {"details": run.details(), "curves": curves, "sheets": sheets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="FOLDER", help="of runs, or a run; of this machine, or s3://..."
    )
    parser.add_argument("--port", type=partial(positive, most=65_535), help=f"default: {PORT}, or a free one")
    parser.add_argument("--export", type=local_path, metavar="FOLDER", help="write files instead of serving")
    parser.add_argument("--overwrite", action="store_true", help="export into a folder even if it holds something")
    given = parser.parse_args()
    if given.export is not None:
        check_folder(given.export, "the page")
        if given.export.is_dir() and any(given.export.iterdir()) and not given.overwrite:
            raise UserError(f"{given.export} is not empty: name a new folder behind --export, or give --overwrite")
        print(export(place_of(given.folder), given.export))
    else:
        serve(place_of(given.folder), given.port)


if __name__ == "__main__":
    run_script(main)
