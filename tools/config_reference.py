"""Write the tables of keys in docs/configuration.md from the config classes of the scripts.

python3 tools/config_reference.py docs/configuration.md

A key stands in one table: that of all the scripts which take it with the same type, default and meaning.
"""

import argparse
from collections import defaultdict
from importlib import import_module
from pathlib import Path

from families.registry import families
from tools.arguments import local_path
from warpcore.config import Settings
from warpcore.errors import UserError, run_script
from warpcore.files import why_no_file
from warpcore.keys import describe
from warpcore.rehearsal import load_use_case
from warpcore.text import read_text

ROOT = Path(__file__).parents[1]
START, END = "<!-- tables of keys: written by `make docs` -->", "<!-- end of the tables of keys -->"
Row = tuple[str, str, str, str]
"""Key, type, default and sentence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=local_path, help="the page, which holds the two marks of the tables")
    page = parser.parse_args().page
    if problem := why_no_file(page):
        raise UserError(f"{page} {problem}")
    page.write_text(with_reference(read_text(page), page), encoding="utf-8")


def with_reference(text: str, page: Path) -> str:
    """The text of a page with everything between the two marks replaced by the current tables.

    Raises:
        UserError: the marks are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UserError(f"{page} has no place for the tables: write the two lines {START} and {END} where they belong")
    return "\n\n".join([before + START, *_sections(), END + after])


def scripts() -> list[str]:
    """The scripts that take a config, such as `train/train_c.py`."""
    paths = [path for folder in ("train", "inference") for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"]


def settings_of(script: str) -> list[type[Settings]]:
    """The classes that hold a script's keys: of inference scripts, one for each family that can do its task."""
    if script.startswith("train/"):
        return [load_use_case(ROOT / script).Config]
    task = import_module(script.removesuffix(".py").replace("/", ".")).TASK
    return [config for family in families() if (config := family.config_of(task)) is not None]


def _sections() -> list[str]:
    """A heading and a table for every group of scripts, the largest groups first."""
    taken_by: dict[Row, list[str]] = defaultdict(list)
    for script in scripts():
        rows = [row for kind in settings_of(script) for row in describe(kind)]
        for row in dict.fromkeys(rows):
            taken_by[row].append(script)
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, takers in taken_by.items():
        groups[tuple(takers)].append(row)
    order = sorted(groups, key=lambda group: (len(group) == 1, -len(group), group))
    return [part for group in order for part in (f"## {_title(group)}", _table(groups[group]))]


def _title(group: tuple[str, ...]) -> str:
    every = {
        folder: [script for script in scripts() if script.startswith(folder)] for folder in ("train", "inference")
    }
    parts = []
    for folder, its_scripts in every.items():
        named = [script for script in its_scripts if script in group]
        if len(named) > 1 and named == its_scripts:
            parts.append(f"every script in `{folder}/`")
        else:
            parts += [f"`{script}`" for script in named]
    title = ", ".join(parts)
    return title[0].upper() + title[1:]


def _table(rows: list[Row]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        default = default.removeprefix(", ").removeprefix("default ")
        cells = (f"`{name}`", kind, f"`{default}`" if default != "required" else default, text)
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
