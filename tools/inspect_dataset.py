"""Look at a data set as training would see it: one page for the browser that holds all it shows.

    python3 tools/inspect_dataset.py data/shards data.html
    python3 tools/inspect_dataset.py train/train_c.py configs/training/quickstart_c.yaml data.html [key=value ...]
    python3 tools/inspect_dataset.py s3://bucket/shards data.html image_size=768 --serve

The page has the samples after their crop, in their buckets, with captions as they are drawn, masks and conditions;
what each condition leaves out; histograms of all columns; buckets that are nearly empty; pictures that look the same,
that are enlarged, or can't be read; captions that the text encoder cuts off. Everything goes through the code that
training reads its data with. Large data sets are sampled, and the page says how.
"""

import warpcore.openmp
import argparse
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tools.arguments import positive
from tools.dataset_look import READ_HERE, look
from tools.dataset_training import REMOTE_SHARDS, Bounds, Training, of_paths, of_script
from tools.pages import TYPES, self_contained
from tools.run_server import HOST
from warpcore.data.storage import local_path
from warpcore.errors import UserError, run_script
from warpcore.files import read_bytes, write_whole
from warpcore.outputs import check_new
from warpcore.safe_yaml import parse_yaml
from warpcore.text import format_bytes, read_text

PAGE, PORT = "dataset.html", 8765
_KEY = re.compile(r"[a-z]\w*(\.\w+)*=")
_YAML = (".yaml", ".yml")
_WANTED = "name the data, or a training script and its config, and behind them the page to write, such as data.html"


def training_of(named: Sequence[str], keys: Sequence[str], bounds: Bounds) -> Training:
    """What the arguments before OUT.html name.

    Raises:
        UserError: a config without its script, or as `of_script` and `of_paths`.
    """
    first = Path(named[0])
    if first.suffix == ".py":
        if len(named) != 2:
            raise UserError(f"{_WANTED}; behind {first} comes one config, found {' '.join(named[1:]) or 'none'}")
        return of_script(local_path(named[0]), [named[1], *keys], bounds)
    if first.suffix in _YAML and first.is_file():
        content = parse_yaml(read_text(first), str(first))
        if isinstance(content, dict) and "path" not in content:
            raise UserError(
                f"{first} is a config: name its training script before it, as in python3 tools/inspect_dataset.py "
                f"train/train_c.py {first} data.html"
            )
    return of_paths(named, keys, bounds)


def server_of(page: Path, port: int) -> ThreadingHTTPServer:
    """What shows the page to browsers of this machine alone. port: 0 for any that is free.

    Raises:
        UserError: something else has the port.
    """

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the browser has left
                super().handle()

        def do_GET(self) -> None:
            own = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
            if self.headers.get("Host") not in own or self.path.partition("?")[0] != "/":
                self.send_error(HTTPStatus.NOT_FOUND)  # a page of another site may have led a browser here
                return
            content = read_bytes(page)
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", TYPES[".html"])
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *about: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--serve: port {port} can't be used ({error.strerror}); give another one") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "named", nargs="+", metavar="DATA ... OUT.html [KEY=VALUE ...]",
        help="tars, folders, globs, brace ranges, s3:// of those, or a training script and its config; then the page "
             "to write, and other values of the config",
    )  # fmt: skip
    own = Bounds()
    parser.add_argument("--pictures", type=positive, default=own.pictures, metavar="N",
                        help=f"samples that are shown as training sees them (default: {own.pictures})")  # fmt: skip
    parser.add_argument("--read", type=positive, metavar="N",
                        help="samples whose caption and picture are read, to find duplicates and captions that are "
                             f"cut (default: {READ_HERE}; of data elsewhere those that are shown)")  # fmt: skip
    parser.add_argument("--rows", type=positive, default=own.rows, metavar="N",
                        help=f"rows that are listed, about (default: {own.rows})")  # fmt: skip
    parser.add_argument("--shards", type=positive, metavar="N",
                        help=f"tars that are looked at (default: all; of data elsewhere {REMOTE_SHARDS})")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="write OUT.html even if it is there")
    parser.add_argument("--serve", nargs="?", type=partial(positive, most=65_535), const=PORT, metavar="PORT",
                        help=f"then show the page at http://127.0.0.1:PORT (default: {PORT})")  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    keys = [one for one in given.named if _KEY.match(one) and not Path(one).exists()]
    *named, out = [one for one in given.named if one not in keys]
    if not named or Path(out).suffix not in (".html", ".htm"):
        raise UserError(f"{_WANTED}: {out} is no name of a page")
    out = local_path(out)
    check_new([out], "name another page, or give --overwrite", given.overwrite)
    began, bounds = time.monotonic(), Bounds(given.shards, given.rows, given.read, given.pictures)
    with server_of(out, given.serve) if given.serve else nullcontext() as server:  # a port in use is told of at once
        found = look(training_of(named, keys, bounds), bounds)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, self_contained(PAGE, found))
        about = found["about"]
        print(f"{out} ({format_bytes(out.stat().st_size)}, {time.monotonic() - began:.1f} s): {about['listed']} of "
              f"{about['rows']} rows of {about['looked_at']} of {about['shards']} tars listed, {about['read']} "
              f"samples read, {about['shown']} shown")  # fmt: skip
        if server is not None:
            print(f"http://{HOST}:{server.server_port}/ until Ctrl-C", flush=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()


if __name__ == "__main__":
    run_script(main)
