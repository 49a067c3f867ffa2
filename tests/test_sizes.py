"""How large files may be: one that a person can read in one sitting, and recorded numbers that a clone can carry."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("warpcore", "modules", "families", "train", "inference", "tools", "models", "benchmarks", "tests")
MAX_LINES, MAX_LINES_OF_A_TRAINING = 400, 150
MAX_GOLDEN_BYTES = 6_500_000
"""Of the cascade's numbers; those of other families have folders of their own."""


def test_files_are_short():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lines) > 400, "this test looks at the files of the project"
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    scripts = {name: count for name, count in lines.items() if name.startswith("train/")}
    assert {name: count for name, count in scripts.items() if count > MAX_LINES_OF_A_TRAINING} == {}


def test_the_numbers_of_the_cascade_are_small():
    files = [
        file for file in (ROOT / "tests" / "golden").iterdir() if ".safetensors" in file.name or ".json" in file.name
    ]
    assert files
    assert sum(file.stat().st_size for file in files) < MAX_GOLDEN_BYTES
