"""The table of cards in docs/memory.md is what the tools count."""

import shlex
from pathlib import Path

import pytest

from benchmarks import memory_table
from benchmarks.memory_table import CARDS, CASES, Case, rows, table, with_rows
from warpcore.errors import UserError
from warpcore.planning import USABLE

PAGE = (Path(__file__).parents[2] / "docs/memory.md").read_text(encoding="utf-8")
CHEAP = "DiT-XL/2 full"


def of_case(case: Case) -> list[list[str]]:
    """The cells of its rows on the page."""
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(PAGE)]
    return [row for row in cells if row[1:3] == [case.family, case.method]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family} {case.method}")
def test_each_row_fits_its_cards_with_settings_that_the_script_takes(case):
    case.load()
    found = of_case(case)
    assert found
    cards = [int(card) for row in found for card in row[0].split(", ")]
    assert cards == [card for card in CARDS if card >= cards[0]]  # what fits a card fits a larger one
    for smallest, settings, gib in ((row[0].split(",")[0], row[3], row[4]) for row in found):
        assert float(gib) <= USABLE * int(smallest) + 0.05
        written = () if settings == "none" else tuple(shlex.split(settings.strip("`")))
        case._replace(keys=(*case.keys, *written)).load()


@pytest.mark.integration
@pytest.mark.slow
def test_a_case_counted_from_scratch_has_the_rows_of_the_page():
    (case,) = memory_table.chosen([CHEAP])
    assert with_rows(PAGE, case, rows(case)) == PAGE


def test_rows_take_the_place_of_those_of_their_case_alone():
    first, second = CASES[0], CASES[2]
    old = [f"| 8 | {case.family} | {case.method} | none | 1 | 0 | |" for case in (first, second)]
    page = f"before\n{memory_table.START}\n\n{memory_table.END}\nafter"
    for case, row in ((second, old[1]), (first, old[0])):
        page = with_rows(page, case, [row])
    assert table(page) == old
    new = old[0].replace("none", "`a=b`")
    assert with_rows(page, first, [new]) == page.replace(old[0], new)
    with pytest.raises(UserError, match="has no place for the table"):
        with_rows("nothing", first, [])


def test_cases_go_by_family_and_method():
    assert [case.config for case in memory_table.chosen(["SDXL LoRA"])] == ["finetune_sdxl_lora"]
    with pytest.raises(UserError, match="no case is called SDXL lora"):
        memory_table.chosen(["SDXL lora"])
