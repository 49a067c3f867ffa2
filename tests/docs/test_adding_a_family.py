"""The guide to a new family, in this process: its files are written, and its own test is run on them."""

import ast
import importlib
import sys

import pytest

import families
import train
from tests.docs.pages import GUIDE, ROOT, blocks, guide_files

MAX_LINES_OF_A_SCRIPT = 100
TEST = "tests/families/shapes/test_shapes.py"


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """A folder with the files of the guide, which `families` and `train` find as if they were their own."""
    if (ROOT / "families" / "shapes").is_dir():
        pytest.skip(f"the guide was followed in this copy of the repository, which has the same test: {TEST}")
    for path, text in guide_files().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    for package in (families, train):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / package.__name__)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("families.shapes", "train.train_shapes")):
            del sys.modules[name]


@pytest.mark.integration
def test_the_family_of_the_guide_passes_its_own_test(followed, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("shown_in_docs.test_shapes", followed / TEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.test_a_run_goes_on_and_is_drawn_from(tmp_path, monkeypatch)


def test_its_script_is_short_and_the_table_names_every_file():
    files = guide_files()
    assert len(files["train/train_shapes.py"].splitlines()) < MAX_LINES_OF_A_SCRIPT
    assert all(f"| `{path}` |" in GUIDE.read_text(encoding="utf-8") for path in files)
    made = [word for block in blocks("sh", pages=[GUIDE]) for word in block.text.split()]
    assert all(path.rpartition("/")[0] in made or (ROOT / path).parent.is_dir() for path in files)


def test_it_imports_no_other_family_and_no_library_at_the_top():
    allowed = {
        "families.common",
        "families.shapes",
        "train.train_shapes",
        "modules",
        "warpcore",
        "torch",
        "pydantic",
        "numpy",
    }
    for path, text in guide_files().items():
        if path.endswith(".py") and not path.startswith("tests/"):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ImportFrom) and node.module not in ("families.shapes",):
                    first = ".".join(node.module.split(".")[:2])
                    known = first in allowed or node.module.split(".")[0] in allowed | set(sys.stdlib_module_names)
                    assert known, f"{path}: {node.module}"


def test_its_line_for_the_linter_adds_the_family_to_those_that_are_there():
    shown = next(block.text.strip() for block in blocks("text", pages=[GUIDE]) if block.text.startswith("layers"))
    there = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace(" | shapes", "")  # where it was followed
    assert shown.replace(" | shapes", "") in there.splitlines()
