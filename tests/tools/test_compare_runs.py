"""Pictures of equal names side by side: the page, the sheets, and what is told of what is missing."""

import base64
import hashlib
import io
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tools import compare_page, compare_runs
from warpcore.errors import UserError
from warpcore.evaluation import sheet
from warpcore.pictures import cells_metadata, save_png
from warpcore.results import Sampled

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)<!--'


class Shown(HTMLParser):
    """What a page shows: its rows, each a heading and by folder the pixels, or the reason why there are none."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows, self.tags, self.texts, self.prompts = [], [], {"style": [], "script": []}, []
        self.inside = None
        self.policy = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.inside = tag
        if tag in self.texts:
            self.texts[tag].append("")
        if tag == "section":
            self.rows.append(["", []])
            self.prompts.append(attributes["data-prompt"])
        elif tag == "img":
            content = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
            self.rows[-1][1].append(np.array(Image.open(io.BytesIO(content))))
        elif "http-equiv" in attributes:
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data
        elif self.inside == "h2":
            self.rows[-1][0] += data
        elif self.inside == "p" and self.rows:
            self.rows[-1][1].append(data)


def flat(value: int, height: int = 8, width: int = 12) -> np.ndarray:
    """In a colour that no text has."""
    return np.full((height, width, 3), (value, 1, 255), np.uint8)


def write(folder: Path, pictures: dict[str, np.ndarray]) -> Path:
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
    return folder


def write_run(folder: Path, sheets: dict[int, dict[str, int]]) -> Path:
    """A run whose samples are sheets of flat pictures, by update and prompt."""
    for update, prompts in sheets.items():
        rows = [Sampled(prompt, {"drawn": flat(value)}) for prompt, value in prompts.items()]
        picture, cells = sheet(rows)
        save_png(folder / "samples" / f"{update:08d}.png", picture, cells_metadata(cells))
    (folder / "config.yaml").write_text("updates: 2\n")
    return folder


def compared(folders: list[Path], out: Path, **options) -> tuple[Shown, str]:
    told = "\n".join(compare_runs.compare_runs(folders, out, **options))
    return Shown(out / "compare.html"), told


def test_pictures_of_equal_names_stand_side_by_side_in_the_order_of_their_numbers(tmp_path):
    names = ["checkpoint-1000/sample-90-0.png", "checkpoint-500/sample-90-10.png", "checkpoint-500/sample-90-2.png"]
    folders = [
        write(tmp_path / which, {name: flat(base + place) for place, name in enumerate(names)})
        for which, base in (("a", 10), ("b", 100), ("c", 200))
    ]
    page, told = compared(folders, tmp_path / "out")
    assert [heading for heading, _ in page.rows] == [
        "checkpoint-500 · sample-90-2.png", "checkpoint-500 · sample-90-10.png", "checkpoint-1000 · sample-90-0.png",
    ]  # fmt: skip
    assert [[int(one[0, 0, 0]) for one in pictures] for _, pictures in page.rows] == [
        [12, 102, 202], [11, 101, 201], [10, 100, 200],
    ]  # fmt: skip
    assert "3 pictures of 3 folders (2 updates, 3 prompts)" in told
    together = np.array(Image.open(tmp_path / "out" / "sheet.png"))
    places = [np.argwhere((together == (value, 1, 255)).all(2)) for value in (12, 102, 202, 10)]
    assert [len(place) for place in places] == [8 * 12] * 4
    assert places[0].min(0)[0] == places[1].min(0)[0] == places[2].min(0)[0] < places[3].min(0)[0]
    assert places[0].max(0)[1] < places[1].min(0)[1] <= places[1].max(0)[1] < places[2].min(0)[1]


def test_sheets_of_runs_are_compared_by_update_and_prompt(tmp_path):
    long = "a caption that no sheet has the room for, " * 20
    runs = [
        write_run(tmp_path / "a", {1: {"red": 10, long: 11}, 2: {"red": 12, long: 13}}),
        write_run(tmp_path / "b", {1: {long: 101, "red": 100, "only here": 102}}),
    ]
    page, told = compared(runs, tmp_path / "out")
    values = [[one if isinstance(one, str) else int(one[0, 0, 0]) for one in pictures] for _, pictures in page.rows]
    assert [heading for heading, _ in page.rows] == [
        "00000001 · drawn: red", f"00000001 · drawn: {long}", "00000001 · drawn: only here",
        "00000002 · drawn: red", f"00000002 · drawn: {long}",
    ]  # fmt: skip
    assert values == [[10, 100], [11, 101], ["missing", 102], [12, "missing"], [13, "missing"]]
    assert all(one.shape == (8, 12, 3) for _, pictures in page.rows for one in pictures if not isinstance(one, str))
    assert page.prompts == ["0", "1", "2", "0", "1"]
    assert "5 pictures of 2 folders (2 updates, 3 prompts)" in told
    assert f"{runs[0]}: 4, 1 missing: 00000001: drawn: only here" in told
    assert f"{runs[1]}: 3, 2 missing" in told


def test_equal_captions_of_a_sheet_are_told_apart(tmp_path):
    for name, base in (("a", 10), ("b", 20)):
        picture, cells = sheet([Sampled("red", {"drawn": flat(base + place)}) for place in range(2)])
        save_png(tmp_path / name / "1.png", picture, cells_metadata(cells))
    page, _ = compared([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [heading for heading, _ in page.rows] == ["1 · drawn: red", "1 · drawn: red (2)"]
    assert [[int(one[0, 0, 0]) for one in pictures] for _, pictures in page.rows] == [[10, 20], [11, 21]]


@pytest.mark.parametrize("damage", ["[", '[["red", 0, 0, 1]]', '[["red", -1, 0, 4, 4]]', "[" * 100_000, None])
def test_a_sheet_that_does_not_tell_of_its_pictures_is_shown_whole(tmp_path, damage):
    for name in ("a", "b"):
        picture, cells = sheet([Sampled("red", {"drawn": flat(9)})])
        about = cells_metadata(cells) if name == "a" else {} if damage is None else {"cells": damage}
        save_png(tmp_path / name / "1.png", picture, about)
    page, told = compared([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [(heading, [one.shape for one in pictures]) for heading, pictures in page.rows] == [
        ("1.png", [picture.shape] * 2)
    ]
    assert ("1 list of pictures in a sheet, which is shown as a whole" in told) == (damage is not None)


def test_a_place_outside_of_the_sheet_is_missing(tmp_path):
    for name, left in (("a", 0), ("b", 7)):
        save_png(tmp_path / name / "1.png", flat(5), {"cells": f'[["red", {left}, 0, 6, 8]]'})
    page, told = compared([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    ((_, pictures),) = page.rows
    assert pictures[0].shape == (8, 6, 3)
    assert pictures[1] == "its place is not in the sheet"
    assert f"{tmp_path / 'b'}: 0, 1 missing" in told


def test_a_picture_that_cannot_be_read_is_shown_as_missing_and_counted(tmp_path):
    a = write(tmp_path / "a", {name: flat(1) for name in ("1.png", "2.jpg", "3.png", "4.png")})
    b = write(tmp_path / "b", {name: flat(2) for name in ("1.png", "2.jpg", "3.png", "4.png")})
    (b / "1.png").write_bytes(b"")
    (b / "2.jpg").write_bytes((b / "2.jpg").read_bytes()[:100])
    (b / "3.png").write_bytes(b"no picture")
    os.remove(b / "4.png")
    os.mkfifo(b / "4.png")
    (b / "5.heic").write_bytes(b"")
    page, told = compared([a, b], tmp_path / "out")
    assert [heading for heading, _ in page.rows] == ["1.png", "2.jpg", "3.png", "4.png"]
    assert all(isinstance(pictures[1], str) and len(pictures[1]) > 3 for _, pictures in page.rows)
    assert f"{b}: 0, 4 missing: 1.png, 2.jpg, 3.png, ..." in told
    assert "left out 5" in told
    assert f"of a format that is not read (.heic): convert them to JPEG or PNG: {b / '5.heic'}" in told


def test_pictures_differ_in_size_and_large_ones_are_shrunk_where_wanted(tmp_path):
    a = write(tmp_path / "a", {"1.png": flat(1, 300, 600)})
    b = write(tmp_path / "b", {"1.png": flat(2, 40, 20)})
    page, _ = compared([a, b], tmp_path / "out")
    assert [one.shape for one in page.rows[0][1]] == [(300, 600, 3), (40, 20, 3)]
    page, _ = compared([a, b], tmp_path / "smaller", size=60)
    assert [one.shape for one in page.rows[0][1]] == [(30, 60, 3), (40, 20, 3)]
    together = np.array(Image.open(tmp_path / "out" / "sheet.png"))
    assert (together == (1, 1, 255)).all(2).sum() == 128 * 256


def test_names_and_captions_are_text_and_nothing_else(tmp_path):
    name = f"{HOSTILE.replace('/', '')} \udcff\u2028\t.png"
    folders = [write(tmp_path / f"{which}<script>", {name: flat(3)}) for which in "ab"]
    for folder in folders:
        picture, cells = sheet([Sampled(HOSTILE + "</section></script>\u202e", {"x": flat(4)})])
        save_png(folder / "0" / "1.png", picture, cells_metadata(cells))
    page, _ = compared(folders, tmp_path / "out")
    assert [heading for heading, _ in page.rows] == [
        f"0/1 · x: {HOSTILE}</section></script>\u202e",
        f"{HOSTILE} \\udcff\u2028\t.png".replace("/", ""),
    ]
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == names.count("style") == 2
    assert names.count("img") == 4
    assert {key for _, attributes in page.tags for key in attributes if key.startswith("on")} == set()


def test_the_page_needs_no_other_file_and_may_run_its_own_script_alone(tmp_path):
    a, b = (write(tmp_path / which, {"1.png": flat(1)}) for which in "ab")
    page, _ = compared([a, b], tmp_path / "out")
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?:|url\(|@import|import\(", "".join(page.texts["script"] + page.texts["style"]))
    assert "default-src 'none'; img-src data:;" in page.policy
    for kind, texts in page.texts.items():
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert f"{kind}-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';" in page.policy


def test_many_rows_go_to_several_sheets(tmp_path):
    names = [f"{number}.png" for number in range(compare_runs.SHEET_ROWS + 1)]
    a, b = (write(tmp_path / which, {name: flat(1, 2, 2) for name in names}) for which in "ab")
    page, _ = compared([a, b], tmp_path / "out")
    assert [heading for heading, _ in page.rows] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "sheet.png", "sheet_2.png"]


def test_a_page_too_large_for_a_browser_is_refused_and_nothing_half_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_page, "MAX_BYTES", 15_000)
    rng = np.random.default_rng(0)
    a, b = (write(tmp_path / which, {"1.png": rng.integers(0, 256, (80, 80, 3), np.uint8)}) for which in "ab")
    with pytest.raises(UserError, match=r"compare.html would have more than .* --size 512"):
        compared([a, b], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    compared([a, b], tmp_path / "out", size=20)


def test_a_page_that_gets_too_large_behind_a_sheet_leaves_no_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_runs, "SHEET_ROWS", 1)
    a, b = (write(tmp_path / which, {f"{i}.png": flat(i) for i in range(4)}) for which in "ab")
    compared([a, b], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == {"compare.html", "sheet.png", "sheet_2.png", "sheet_3.png", "sheet_4.png"}
    monkeypatch.setattr(compare_page, "MAX_BYTES", len(before["compare.html"]) - 1)
    write(tmp_path / "a", {"0.png": flat(9)})
    with pytest.raises(UserError, match=r"compare\.html would have more than"):
        compared([a, b], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.integration
def test_runs_and_folders_on_s3_stand_beside_those_of_this_machine(bucket, tmp_path):
    prompts = {1: {"a fox": 1, "a cat": 2}, 2: {"a fox": 3, "a cat": 4}}
    here = write_run(tmp_path / "here", prompts)
    for path in here.rglob("*.*"):
        bucket.put(f"runs/there/{path.relative_to(here)}", path.read_bytes())
    bucket.put("runs/there/state/00000002/rank_0.distcp", b"x")
    bucket.put("runs/there/samples/../odd.png", b"x")
    bucket.put("runs/there/samples/broken.png", b"x")
    page, told = compared([here, f"{bucket.url}/runs/there"], tmp_path / "out")
    assert [heading for heading, _ in page.rows] == [
        "00000001 · drawn: a fox", "00000001 · drawn: a cat", "00000002 · drawn: a fox",
        "00000002 · drawn: a cat", "broken.png",
    ]  # fmt: skip
    assert all(np.array_equal(*pictures) for _, pictures in page.rows[:4])
    assert f"1 not the name of a file: {bucket.url}/runs/there/samples/../odd.png" in told
    assert re.search(rf"1 unreadable \(.*\): {bucket.url}/runs/there/broken\.png", told)
    with pytest.raises(UserError, match=r"s3://.*/runs/nowhere has none"):
        compared([here, f"{bucket.url}/runs/nowhere"], tmp_path / "out")


def test_folders_without_a_common_name_are_refused_with_what_they_hold(tmp_path):
    a, b = write(tmp_path / "a", {"1.png": flat(1)}), write(tmp_path / "b", {"2.png": flat(1)})
    with pytest.raises(UserError, match=r"no picture has the same name in two .*a has 1.png; .*b has 2.png"):
        compared([a, b], tmp_path / "out")
    c = write(tmp_path / "c", {"x\ny\x1b[1m.png": flat(1)})
    with pytest.raises(UserError, match=r"a has 1.png; .*c has x\\ny\\x1b\[1m.png$"):
        compared([a, c], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a has 1.png; .*empty has none"):
        compared([a, tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_into_a_compared_folder_is_not_compared_the_next_time(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a", {"1.png": flat(1)}), write(tmp_path / "b", {"1.png": flat(1)})
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(a), str(b), str(a / "out"), "--overwrite"])
        compare_runs.main()
        assert "1 picture of 2 folders" in capsys.readouterr().out


def test_sheets_of_an_earlier_comparison_of_more_pictures_go(tmp_path):
    a, b = write(tmp_path / "a", {"1.png": flat(1)}), write(tmp_path / "b", {"1.png": flat(1)})
    write(tmp_path / "out", {"sheet.png": flat(2), "sheet_2.png": flat(2), "sheet_3.png": flat(2), "own.png": flat(2)})
    compared([a, b], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "own.png", "sheet.png"]
