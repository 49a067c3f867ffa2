"""Pages that are one file: they hold their styles, scripts and data, and nothing in the data gets out of its place."""

import json
import re
from html.parser import HTMLParser

import pytest

from tools import pages

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "]]>", "\u2028", '"\\', "\ud800", "&lt;"]
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>A page</title>
<link rel="stylesheet" href="style.css">
<body><p id="found"></p>
<script type="application/json" id="data"></script>
<script src="test.js"></script>
</body>
</html>
"""
SCRIPT = 'document.getElementById("found").textContent = JSON.parse(document.getElementById("data").textContent).text;'


@pytest.fixture
def page_files(tmp_path, monkeypatch):
    (tmp_path / "style.css").write_text(pages.page_file("style.css"), encoding="utf-8")
    (tmp_path / "test.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "test.js").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    pages.page_file.cache_clear()
    yield
    pages.page_file.cache_clear()


class _Scripts(HTMLParser):
    """What stands in the page's scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self._inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "script"
        if self._inside:
            self.found.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.found[-1] += data


@pytest.mark.parametrize("text", HOSTILE)
def test_data_stay_in_their_place(page_files, text):
    data, script = _Scripts(pages.self_contained("test.html", {"text": text, text: [text]})).found
    assert json.loads(data) == {"text": text, text: [text]}
    assert script == SCRIPT


def test_nothing_is_named_that_is_not_inside(page_files):
    page = pages.self_contained("test.html", {})
    assert not re.search(r"(?:src|href)=", page)


def test_no_number_is_written_that_json_lacks():
    with pytest.raises(ValueError, match="JSON"):
        pages.as_json([float("nan")])


def test_every_page_names_files_that_are_there():
    for page in pages.FOLDER.glob("*.html"):
        for name in re.findall(r'(?:src|href)="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (pages.FOLDER / name).is_file(), f"{page.name} names {name}"


@pytest.mark.integration
@pytest.mark.browser
def test_the_browser_runs_the_page_and_nothing_in_its_data(browser, page_files, tmp_path):
    (tmp_path / "out.html").write_text(pages.self_contained("test.html", {"text": HOSTILE[0]}), encoding="utf-8")
    tab = browser.open(f"file://{tmp_path}/out.html", dark=True)
    assert tab.texts("#found") == [HOSTILE[0]]
    assert tab.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(32, 33, 36)"
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert tab.run("window.ran") is None
    assert "Content Security Policy" in tab.errors.pop()
    tab.close()
