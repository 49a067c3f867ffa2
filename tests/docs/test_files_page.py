"""docs/files.md names every format that a family exports, with a way in which it was tried and the test of it."""

import re

import pytest

from families.registry import families
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "files.md"
WAYS = ("itself", "rules", "golden", "refused", "not a format")
BACK = {"itself", "rules", "golden", "bits", "rounding", ""}


def rows(title: str) -> list[list[str]]:
    """The cells of a family's table, without its head."""
    part = re.search(rf"^### {title}\n(.*?)(?=^##)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert part, f"docs/files.md has no table of {title}"
    lines = [line for line in part[1].splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("family", [one for one in families() if one.formats], ids=lambda family: family.name)
def test_each_format_of_a_family_has_a_row(family):
    named = {match[1] for row in rows(family.title) if (match := re.match(r"`([\w-]+)`", row[0]))}
    assert named == {form.name for form in family.formats}


@pytest.mark.parametrize("family", [one for one in families() if one.formats], ids=lambda family: family.name)
def test_each_row_says_how_it_was_tried_and_by_which_test(family):
    for form, program, tried, back, test in rows(family.title):
        assert tried.startswith(WAYS) or (not tried and back), f"{form}, {program}: {tried}"
        assert {word.split(" ")[0] for word in back.split(", ")} <= BACK, f"{form}, {program}: {back}"
        assert (ROOT / test.strip("`")).is_file(), f"{form}, {program}: {test}"
