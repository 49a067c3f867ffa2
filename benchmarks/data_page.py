"""The page of a data set (`tools/inspect_dataset.py`): how long it takes to make, to open in Chromium, and to scroll.

    python3 benchmarks/data_page.py [--rows 100000] [--out PAGE.html]

The rows are small pictures of many shapes in 20 tars, indexed before, with captions and four columns.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.browser import Browser
from tools.index_dataset import index_dataset

TARS = 20
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


def write_tars(folder: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    for number in range(TARS):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for row in range(number, rows, TARS):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="keep the page here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        data, page = Path(folder, "data"), (given.out or Path(folder, "page.html")).resolve()
        data.mkdir()
        write_tars(data, given.rows)
        index_dataset([str(data)], 1)
        began = time.monotonic()
        command = [sys.executable, "tools/inspect_dataset.py", str(data), str(page), "image_size=64", "--overwrite",
                   "multi_aspect_ratio=[1/1, 1/2]", "dataset_filters=[[score, 'lambda s: s > 4']]"]  # fmt: skip
        subprocess.run(command, check=True)
        made, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        browser = Browser(shutil.which("chromium") or "chromium-browser", Path(folder))
        try:
            tab = browser.open("about:blank#")
            began = time.monotonic()
            tab.send("Page.navigate", url=page.as_uri())
            tab.wait("document.querySelectorAll('.card').length > 0")
            opened = time.monotonic() - began
            tab.click("#tab-rows")
            times = tab.run(SCROLLED)
            searched = tab.run(FOUND)
            tab.close()
        finally:
            browser.close()
        print(f"{given.rows} rows: page of {page.stat().st_size / 1e6:.1f} MB")
        seconds = used.ru_utime + used.ru_stime
        print(f"made in {made:.1f} s ({seconds:.1f} s of a processor, {used.ru_maxrss / 1e3:.0f} MB)")
        print(f"opened in {opened:.2f} s, the first search in {searched:.0f} ms")
        print(f"frames while scrolling through all: median {times[len(times) // 2]:.0f} ms, "
              f"95% below {times[int(0.95 * len(times))]:.0f} ms, at most {times[-1]:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
