"""The run page in a browser: chosen from, filtered, compared, slid through and played, without an error."""

import json

import pytest

from tests.tools.made_up_runs import lines, make_run, write_lines
from tests.tools.test_run_page import HOSTILE, NOTES, served
from tools.compare_runs import compare_runs
from tools.run_places import LocalRuns
from tools.runs import export, place_of

pytestmark = [pytest.mark.integration, pytest.mark.browser]

STRANGE = 'a "<b>&amp;\u202e #?%2e%2f'
PROMPTS = {10: {"a fox": 40, HOSTILE: 80}, 20: {"a fox": 120, HOSTILE: 160}}


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "a", 10, notes=NOTES, samples=PROMPTS)
    make_run(tmp_path / STRANGE, samples=PROMPTS, lr=HOSTILE, only_here=1)
    return tmp_path


def greys(tab, selector: str) -> list[int]:
    """The red of the middle of each canvas."""
    script = "one => one.getContext('2d').getImageData(8, 8, 1, 1).data[0]"
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map({script})")


def legend(tab) -> list[str]:
    return [text.replace("\n", " ") for text in tab.texts(".chart li")]


def test_the_page_is_chosen_from_filtered_compared_and_slid_through_by_keys(browser, runs):
    with served(runs) as url:
        tab = browser.open(url)
        tab.wait("document.querySelectorAll('.chart li').length === 2")
        rows = [text.replace("\t", " ").split(maxsplit=1) for text in tab.texts("#runs tr")]
        assert any("killed" in " ".join(row) and "10 / 20" in " ".join(row) for row in rows)
        assert any(STRANGE in name for name in tab.texts("#runs label"))
        assert tab.run("document.querySelector('.uplot').getAttribute('aria-label')") == "loss of 2 runs over updates"
        assert any("0.05 at 20" in text for text in legend(tab))

        for key, name in (("t", "time of training"), ("t", "updates")):
            tab.press(key)
            tab.wait(f"document.querySelector('.uplot')?.getAttribute('aria-label').endsWith({name!r})")
        for _ in range(3):
            tab.press("+")
        assert tab.texts("#window") == ["10"]
        tab.press("l")
        tab.wait("document.querySelectorAll('.chart li').length === 2")
        tab.click("#metrics input[value=lr]")
        tab.wait("document.querySelectorAll('.chart canvas').length === 2")

        tab.press("/")
        for letter in "kill":
            tab.press(letter)
        tab.wait("[...document.querySelectorAll('#runs tr')].filter(row => !row.hidden).length === 1")
        tab.press("Escape")
        tab.run("byId('filter').value = ''; byId('filter').dispatchEvent(new Event('input'))")

        tab.press("s")
        tab.wait("document.querySelectorAll('#pictures canvas').length === 8")
        assert sorted(greys(tab, "#pictures section:first-child canvas")) == [120, 120, 129, 129]
        assert tab.texts("#pictures h2") == ["a fox", HOSTILE]
        tab.press("ArrowUp")
        tab.wait("document.getElementById('at').textContent === '10'")
        tab.wait("document.querySelector('#pictures figcaption').innerText.endsWith('10')")
        assert sorted(greys(tab, "#pictures section:first-child canvas")) == [40, 40, 49, 49]
        tab.press("ArrowDown")
        tab.press("2")
        tab.wait("document.querySelector('#pictures').classList.contains('alone')")
        tab.press("a")
        tab.press("ArrowRight")
        tab.wait("[...document.querySelectorAll('#pictures canvas')].filter(one => one.offsetParent).length === 1")
        tab.press("p")
        tab.wait("document.getElementById('play').getAttribute('aria-pressed') === 'true'")
        tab.wait("document.getElementById('at').textContent === '10'")
        tab.press("p")

        tab.press("d")
        tab.wait("document.querySelectorAll('#keys tr').length === 3")
        assert {text.split("\t")[0] for text in tab.texts("#keys tr")} == {"experiment_id", "lr", "only_here"}
        assert any(HOSTILE in text and "0.001" in text for text in tab.texts("#keys tr"))
        tab.click("#equal")
        tab.wait("document.querySelectorAll('#keys tr').length === 5")

        tab.press("n")
        tab.wait("document.querySelectorAll('.run-notes').length === 2")
        assert "cd '/home/me/my project' && python3 train/train_c.py a.yaml" in tab.texts(".run-notes pre")
        tab.click("#bad")
        tab.wait("document.querySelectorAll('.run-notes li').length === 1")
        assert tab.texts(".run-notes li")[0].endswith(f"bad sample a.tar/{HOSTILE}: no picture")
        assert tab.run("document.title") == "Runs"
        tab.close()


def test_every_control_has_a_name_and_tabs_move_by_arrows(browser, runs):
    with served(runs) as url:
        tab = browser.open(url, dark=True)
        tab.wait("document.querySelector('.chart li')")
        tab.send("Accessibility.enable")
        tree = tab.send("Accessibility.getFullAXTree")["nodes"]
        controls = ("button", "checkbox", "searchbox", "slider", "combobox", "tab", "textbox", "img")
        found = [node for node in tree if node.get("role", {}).get("value") in controls and not node["ignored"]]
        assert len(found) > 15
        assert [node for node in found if not node.get("name", {}).get("value")] == []
        tab.run("document.getElementById('tab-curves').focus()")
        for name in ("samples", "differences", "notes", "curves"):
            tab.press("ArrowRight")
            assert tab.run("document.activeElement.id") == f"tab-{name}"
            assert tab.run(f"document.getElementById('{name}').hidden") is False
        tab.close()


def test_in_a_narrow_window_no_word_is_broken_and_nothing_is_cut_off(browser, runs):
    with served(runs) as url:
        tab = browser.open(url, width=340)
        tab.wait("document.querySelector('.chart li')")
        tab.run("""globalThis.lines = one => {
            const text = document.createRange();
            text.selectNodeContents(one);
            return text.getClientRects().length;
        }""")
        lines = tab.run("[...document.querySelectorAll('#runs td:nth-child(n + 3)')].map(lines)")
        assert (len(lines), max(lines)) == (12, 1)
        for name in ("samples", "differences", "notes", "curves"):
            tab.click(f"#tab-{name}")
            assert tab.run("document.documentElement.scrollWidth") == 340, name
        tab.close()


def test_a_run_is_followed_and_what_vanishes_is_said(browser, runs, monkeypatch):
    monkeypatch.setattr(LocalRuns, "seconds", 0.05)
    with served(runs) as url:
        tab = browser.open(url)
        tab.wait("document.querySelector('.chart li')")
        with open(runs / "a" / "metrics.jsonl", "a", encoding="utf-8") as file:
            whole = json.dumps(lines(11)[-1]) + "\n"
            file.write(whole[:40])
            file.flush()
            make_run(runs / "new", 5)
            tab.wait("document.querySelectorAll('#runs tr').length === 3")
            assert any("10 / 20" in text for text in tab.texts("#runs tr"))
            tab.wait("document.querySelectorAll('.chart li').length === 3")
            file.write(whole[40:])
        write_lines(runs / "a" / "metrics.jsonl", lines(12, first=12), "a")
        tab.wait("[...document.querySelectorAll('#runs tr')].some(row => row.innerText.includes('12 / 20'))")
        tab.wait("[...document.querySelectorAll('.chart li')].some(one => one.innerText.includes('at 12'))")
        tab.press("s")
        tab.wait("document.querySelectorAll('#pictures canvas').length === 8")
        (runs / "a" / "samples/00000010.png").write_bytes(b"no picture any more")
        (runs / STRANGE / "samples/00000010.png").unlink()
        tab.run("samples.sheets.clear()")
        tab.press("ArrowUp")
        tab.wait("[...document.querySelectorAll('#pictures .missing')].some(one => one.innerText.includes('damaged'))")
        lost = ("/api/1/sheet/10", "/picture/1/00000010.png")  # whichever it asks for first
        assert all("404" in error and error.endswith(lost) for error in tab.errors), tab.errors
        tab.errors.clear()
        tab.close()


def test_a_long_run_is_first_drawn_from_some_of_its_lines_and_then_from_all(browser, tmp_path):
    make_run(tmp_path / "long", 8_000)
    with served(tmp_path) as url:
        tab = browser.open(url)
        tab.wait("document.querySelector('.chart li')")
        tab.wait("[...curves.loaded.values()].every(one => one.curve?.whole)")
        assert tab.run("[...curves.loaded.values()][0].curve.count.reduce((a, b) => a + b)") == 8_000
        tab.run("curves.zoom([100, 200])")
        tab.wait("[...curves.loaded.values()].some(one => one.curve?.x.length === 103)")
        tab.close()


def test_pictures_of_two_folders_are_flipped_through_by_keys(browser, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    compare_runs([runs / "a", runs / STRANGE], out)
    tab = browser.open(f"file://{out}/compare.html")
    shown = "[...document.querySelectorAll('figure')].filter(one => one.offsetParent).length"
    assert (tab.texts("#place"), tab.run(shown)) == (["1 / 8"], 2)
    for key, place, figures in (("ArrowRight", 2, 2), ("Tab", 2, 1), ("ArrowDown", 6, 1), ("0", 6, 2), ("a", 6, 16)):
        tab.press(key)
        assert (tab.texts("#place"), tab.run(shown)) == ([f"{place} / 8"], figures), key
    tab.click("section:nth-child(3) figure")
    assert (tab.texts("#place"), tab.run(shown)) == (["3 / 8"], 8)
    assert tab.run("location.hash") == "#3.1"
    tab.close()


def test_an_exported_page_shows_the_same_without_a_server(browser, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    make_run(runs / "begun")
    (runs / "begun/metrics.jsonl").unlink()
    told = export(place_of(str(runs)), out)
    assert told.startswith(f"3 runs in {out}/index.html")
    tab = browser.open(f"file://{out}/index.html")
    tab.wait("document.querySelectorAll('.chart li').length === 2")
    tab.press("t")
    tab.wait("document.querySelector('.uplot')?.getAttribute('aria-label').endsWith('time of training')")
    assert tab.texts("#status") == [""]
    tab.press("s")
    tab.wait("document.querySelectorAll('#pictures canvas').length === 8")
    assert tab.texts("#pictures h2") == ["a fox", HOSTILE]
    tab.press("n")
    tab.wait("document.querySelectorAll('.run-notes').length === 3")
    tab.run("navigator.clipboard.writeText = async () => { throw new Error('refused'); }")
    tab.click("#told button")
    tab.wait("document.querySelector('#told button').innerText === 'Selected: press Ctrl+C'")
    assert tab.run("getSelection().toString().trim()") == tab.texts("#told pre")[0].strip()
    assert tab.run("document.title") == "Runs"
    tab.close()
