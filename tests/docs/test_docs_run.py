"""The quick commands that the pages show do what they promise: blocks marked `sh run` are run as they stand.

They run in a copy of the repository, after a quickstart in small: fewer pictures and two updates.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import commands
from tests.docs.pages import GUIDE, PAGES, ROOT, blocks, guide_files

pytestmark = [pytest.mark.integration, pytest.mark.slow]
FOLDERS = ("train", "inference", "tools", "families", "warpcore", "modules", "configs", "models/mini", "benchmarks")
QUICKSTART = """
python3 tools/make_demo_dataset.py demo/pictures --num_pictures 96
python3 tools/build_dataset.py demo/pictures demo/shards
python3 train/train_c.py configs/training/quickstart_c.yaml batch_size=16 validation_samples=8
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository's own files, where a short quickstart has run."""
    folder = tmp_path_factory.mktemp("docs") / "warpcore"
    folder.mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for words in commands(QUICKSTART):
        run(words, folder)
    return folder


def run(words: list[str], folder: Path) -> None:
    """Run a command; trainings make two updates."""
    if words[0] == "python3":
        words = [sys.executable, *words[1:]]
    if words[1:] and words[1].startswith("train/"):
        words = [*words, "updates=2", "save_every=2", "num_workers=0"]
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


OTHERS = [page for page in PAGES if page != GUIDE]


@pytest.mark.parametrize("block", [block for block in blocks("sh", pages=OTHERS) if block.note == "run"], ids=str)
def test_a_block_runs(block, clone):
    for words in commands(block.text):
        run(words, clone)


def test_the_guide_to_a_new_family_can_be_followed(clone):
    first, *others = [block for block in blocks("sh", pages=[GUIDE]) if block.note == "run"]
    for words in commands(first.text):
        run(words, clone)
    for path, text in guide_files().items():
        (clone / path).write_text(text, encoding="utf-8")
    line = next(block.text.strip() for block in blocks("text", pages=[GUIDE]) if block.text.startswith("layers"))
    settings = clone / "pyproject.toml"
    settings.write_text(settings.read_text().replace(line.replace(" | shapes", ""), line))
    run([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], clone)
    for block in others:
        for words in commands(block.text):
            run(words, clone)
