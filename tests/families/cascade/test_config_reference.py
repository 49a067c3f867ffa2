"""The README's configuration tables are those of the config classes."""

from pathlib import Path

from tools.config_reference import with_reference


def test_the_readme_is_current():
    text = (Path(__file__).parents[3] / "README.md").read_text()
    assert with_reference(text) == text, "run `make readme`"
