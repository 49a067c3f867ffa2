"""What the README and the pages of docs/ show: fenced blocks, inline code, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "docs" / "adding_a_family.md"
"""Its blocks are the files of a small family, and commands on these: `test_adding_a_family.py` runs them."""
_FENCE = re.compile(r"^ *```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: ```` ```LANGUAGE NOTE ````, such as `sh run` or `yaml train/train_b.py`."""

    page: Path
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """Those of these languages, or all."""
    return [block for page in pages for block in _split(page)[0] if block.language in languages or not languages]


def guide_files() -> dict[str, str]:
    """The files that the guide to a new family shows whole, by their path in the repository."""
    return {block.note: block.text for block in blocks("python", "yaml", pages=[GUIDE]) if "/" in block.note}


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _split(page)[1]


def inline_code(page: Path) -> list[str]:
    """What stands in `code`, but for the first column of tables headed `theirs`: names of other programs."""
    kept, of_others = [], False
    for line in prose(page).splitlines():
        of_others = line.startswith("| theirs") or (of_others and line.startswith("|"))
        kept.append(re.sub(r"^\|.*?(?<!\\)\|", "|", line) if of_others else line)
    return re.findall(r"`([^`\n]+)`", "\n".join(kept).replace("\\|", "|"))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _split(page: Path) -> tuple[list[Block], str]:
    found, outside, inside = [], [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and inside is None:
            language, _, note = fence.group(1).strip().partition(" ")
            start, inside = number, []
        elif fence:
            found.append(Block(page, start, language, note.strip(), "\n".join(inside) + "\n"))
            inside = None
        else:
            (outside if inside is None else inside).append(line)
    assert inside is None, f"{page}:{start}: this block is not closed"
    return found, "\n".join(outside)
