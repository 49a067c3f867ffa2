"""The tables in docs/configuration.md are those of the config classes."""

from pathlib import Path

import pytest

from tools.config_reference import scripts, settings_of, with_reference
from warpcore.errors import UserError
from warpcore.keys import describe

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current():
    text = PAGE.read_text(encoding="utf-8")
    assert with_reference(text, PAGE) == text, "run `make docs`"


@pytest.mark.parametrize("script", scripts())
def test_every_key_of_a_script_is_in_a_table_whose_heading_names_it(script):
    folder = script.partition("/")[0]
    written = set()
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, table = section.partition("\n")
        if script in heading or f"every script in `{folder}/`" in heading.lower():
            written |= {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert written == {key for kind in settings_of(script) for key, *_ in describe(kind)}


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(UserError, match=r"page\.md has no place for the tables: write the two lines <!-- tables"):
        with_reference("# Configuration\n", Path("page.md"))
