"""The page of a data set (`tools/inspect_dataset.py`): how long it takes to make, to open in Chromium, and to scroll.

    python3 benchmarks/data_page.py [--rows 100000] [--out PAGE.html]
    python3 benchmarks/data_page.py --s3

The rows are small pictures of many shapes in 20 tars, indexed before, with captions and four columns. With `--s3`, how
long it takes to make the page of 1,000 such tars of 20 rows on an S3 server on this machine, which is sampled.
"""

import argparse
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import boto3
import numpy as np
from moto.server import ThreadedMotoServer
from PIL import Image

from tests.browser import Browser
from tests.s3_server import Bucket
from tools.index_dataset import index_dataset

TARS, REMOTE_TARS = 20, 1000
SHAPES = ((64, 48), (48, 64), (64, 64), (96, 40), (20, 20))
STEPS = 200
SCROLLED = f"""new Promise(resolve => {{
  const box = document.getElementById("list"), times = [];
  let last = performance.now();
  function step(now) {{
    times.push(now - last);
    last = now;
    if (times.length > {STEPS}) return resolve(times.slice(1).sort((a, b) => a - b));
    box.scrollTop = times.length / {STEPS} * box.scrollHeight;
    requestAnimationFrame(step);
  }}
  requestAnimationFrame(step);
}})"""
FOUND = """new Promise(resolve => {
  const box = document.getElementById("search"), began = performance.now();
  new MutationObserver(() => resolve(performance.now() - began)).observe(
    document.getElementById("found"), {childList: true, characterData: true, subtree: true});
  box.value = "number 77";
  box.dispatchEvent(new Event("input", {bubbles: true}));
})"""


def write_tars(folder: Path, rows: int, tars: int = TARS) -> None:
    random = np.random.default_rng(0)
    for number in range(tars):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for row in range(number, rows, tars):
                width, height = SHAPES[row % len(SHAPES)]
                picture = Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))
                picture.paste(
                    tuple(random.integers(0, 256, 3).tolist()), (width // 4, height // 4, width // 2, height)
                )
                content = io.BytesIO()
                picture.save(content, "PNG")
                about = {"score": round(random.normal(5, 1), 3), "year": int(random.integers(1900, 2030)),
                         "artist": f"artist {row % 500}", "safe": row % 9 > 0}  # fmt: skip
                members = {"png": content.getvalue(), "txt": f"a picture of two colours, number {row}".encode(),
                           "json": json.dumps(about).encode()}  # fmt: skip
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{row:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def make(data: str, page: Path) -> None:
    """Make the page, and say what that took."""
    began, before = time.monotonic(), _processor_seconds()
    command = [sys.executable, "tools/inspect_dataset.py", data, str(page), "image_size=64", "--overwrite",
               "multi_aspect_ratio=[1/1, 1/2]", "dataset_filters=[[score, 'lambda s: s > 4']]"]  # fmt: skip
    subprocess.run(command, check=True)
    print(f"page of {page.stat().st_size / 1e6:.1f} MB made in {time.monotonic() - began:.1f} s "
          f"({_processor_seconds() - before:.1f} s of a processor)")  # fmt: skip


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def look_on_s3(folder: Path, page: Path) -> None:
    """Make the page of REMOTE_TARS tars on S3."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
                   "AWS_ENDPOINT_URL": f"http://{host}:{port}"}  # fmt: skip
    bucket = Bucket(boto3.client("s3"), "data")
    write_tars(folder, 20 * REMOTE_TARS, REMOTE_TARS)
    url = bucket.upload(folder, "set/").rstrip("/")
    index_dataset([url], 1)
    make(url, page)
    server.stop()


def open_in_browser(folder: Path, page: Path) -> None:
    """Open the page, search in it, scroll, and say what each took."""
    browser = Browser(shutil.which("chromium") or "chromium-browser", folder)
    try:
        tab = browser.open("about:blank#")
        began = time.monotonic()
        tab.send("Page.navigate", url=page.as_uri())
        tab.wait("document.querySelectorAll('.card').length > 0")
        opened = time.monotonic() - began
        tab.click("#tab-rows")
        times, searched = tab.run(SCROLLED), tab.run(FOUND)
        tab.close()
    finally:
        browser.close()
    print(f"opened in {opened:.2f} s, the first search in {searched:.0f} ms")
    print(f"frames while scrolling through all: median {times[len(times) // 2]:.0f} ms, "
          f"95% below {times[int(0.95 * len(times))]:.0f} ms, at most {times[-1]:.0f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="keep the page here")
    parser.add_argument("--s3", action="store_true", help="of many tars on S3 instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        data, page = Path(folder, "data"), (given.out or Path(folder, "page.html")).resolve()
        data.mkdir()
        if given.s3:
            look_on_s3(data, page)
            return
        write_tars(data, given.rows)
        index_dataset([str(data)], 1)
        make(str(data), page)
        open_in_browser(Path(folder), page)


if __name__ == "__main__":
    main()
