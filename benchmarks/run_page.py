"""How long the run page takes to open in Chromium, and how smooth it is, with many long runs.

    python3 benchmarks/run_page.py --runs 20 --updates 100000

Makes up runs in a temporary folder (25 MB each for 100,000 updates), serves them by `tools/runs.py`, and opens the
page in a browser that knows nothing of it. Printed are the seconds until the list of runs is shown, and until the
losses of all of them are drawn: first from some of the lines, then from all. Then those of a chart over time, of a
part of it, and the longest that the page answers to nothing meanwhile.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.browser import Browser
from tools.arguments import positive
from warpcore.errors import UserError, run_script

ROOT = Path(__file__).parents[1]
WATCH = """
window.longest = 0; let last = performance.now();
(function tick() { const now = performance.now(); window.longest = Math.max(window.longest, now - last); last = now;
  setTimeout(tick, 5); })();
"""


def make_run(folder: Path, updates: int, seed: int) -> None:
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for update in range(1, updates + 1):
            loss = 1 / (1 + update / 1000) + chance.random() / 10
            line = {
                "update": update, "samples_hash": f"{chance.getrandbits(64):016x}", "loss": loss, "raw_loss": loss,
                "grad_norm": chance.random(), "lr": 1e-4, "data_wait": chance.random() / 1e4,
                "samples_seen": 16 * update, "samples_per_second": 26.6 + update % 100 / 50,
            }  # fmt: skip
            if update % 1000 == 0:
                line |= {"validation_loss": loss}
            file.write(json.dumps(line) + "\n")
    (folder / "config.yaml").write_text(f"updates: {updates}\nlr: {seed}\n", encoding="utf-8")


def measure(runs: int, updates: int) -> list[str]:
    program = shutil.which("chromium")
    if program is None:
        raise UserError("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number in range(runs):
            make_run(Path(folder, "runs", f"run_{number}"), updates, number)
        command = [sys.executable, "-m", "tools.runs", str(Path(folder, "runs"))]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
        browser = Browser(program, Path(folder, "browser"))
        try:
            url = server.stdout.readline().split(" at ")[1].split()[0]
            return list(_times(browser, url, runs))
        finally:
            browser.close()
            server.terminate()
            server.wait()


def _times(browser: Browser, url: str, runs: int):
    drawn = f"document.querySelectorAll('.chart li').length === {runs}"
    browser.open("about:blank#warm").close()
    started = time.perf_counter()
    tab = browser.open(url)
    tab.wait(f"document.querySelectorAll('#runs tr').length === {runs}")
    yield f"the list of {runs} runs is shown after {time.perf_counter() - started:.2f} s"
    tab.wait(drawn)
    yield f"the losses of all are drawn after {time.perf_counter() - started:.2f} s"
    tab.wait("[...curves.loaded.values()].every(one => one.curve?.whole)")
    yield f"from all their lines after {time.perf_counter() - started:.2f} s"
    tab.run(WATCH)
    for what, change in (("over time", "byId('by').value = 'time'; byId('by').dispatchEvent(new Event('change'))"),
                         ("a part of it", "curves.zoom([1000, 2000])"),
                         ("smoothed", "byId('smooth').value = 6; curves.smoothed()")):  # fmt: skip
        started = time.perf_counter()
        tab.run(f"document.querySelectorAll('.chart li').forEach(one => one.remove()); {change}; 0")
        tab.wait(drawn)
        yield f"{what}: {time.perf_counter() - started:.2f} s"
    yield f"the page answered to nothing for {tab.run('window.longest'):.0f} ms at most"
    tab.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive, default=20)
    parser.add_argument("--updates", type=positive, default=100_000)
    given = parser.parse_args()
    print("\n".join(measure(given.runs, given.updates)))


if __name__ == "__main__":
    run_script(main)
