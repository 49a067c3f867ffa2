"""The table of docs/memory.md: the cheapest settings that fit a card, by family and method, counted on shapes.

    python3 benchmarks/memory_table.py docs/memory.md ["SDXL LoRA" ...]

Writes the rows of all cases, or of those that are named, and leaves the others. A case takes up to some minutes.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tools.arguments import local_path
from tools.cache_features import as_if_cached
from warpcore.config import Config, load_config
from warpcore.core import WarpCore
from warpcore.errors import UserError, run_script
from warpcore.files import why_no_file, writing
from warpcore.fitting import on_command_line
from warpcore.planning import GIB, Plan, gib
from warpcore.rehearsal import load_use_case
from warpcore.text import read_text

ROOT = Path(__file__).parents[1]
CARDS = (8, 12, 16, 24, 48, 80)
"""GiB."""
BASE = ("batch_size=1", "activation_checkpointing=0", "use_fsdp=false", "offload=[]")
START, END = "<!-- table of cards: written by benchmarks/memory_table.py -->", "<!-- end of the table of cards -->"
HEAD = (
    "| card (GB) | family | method | settings | GiB | GiB of the CPU's memory | s per step |",
    "|---|---|---|---|---|---|---|",
)


class Case(NamedTuple):
    family: str
    method: str
    script: str
    config: str
    keys: tuple[str, ...] = ()
    """Beside those of `BASE`."""

    @property
    def arguments(self) -> list[str]:
        return [f"configs/training/{self.config}.yaml", *BASE, *self.keys]

    def load(self) -> tuple[type[WarpCore], Config]:
        use_case = load_use_case(ROOT / f"train/{self.script}.py")
        config, *keys = self.arguments
        return use_case, load_config(use_case.Config, [str(ROOT / config), *keys])


ONE, AVERAGE = ("micro_batch_size=null",), ("micro_batch_size=null", "ema_device=same")
CASES = (
    Case("SD 1.5, 512 px", "LoRA", "train_sd_lora", "finetune_sd15_lora"),
    Case("SD 1.5, 512 px", "full", "train_sd", "finetune_sd15", AVERAGE),
    Case("SDXL, 1024 px", "LoRA", "train_sd_lora", "finetune_sdxl_lora"),
    Case("SDXL, 1024 px", "full", "train_sd", "finetune_sdxl", AVERAGE),
    Case("Stage C 3.6B, 1024 px", "LoRA", "train_c_lora", "finetune_c_3b_lora"),
    Case("Stage C 3.6B, 768 px", "full", "train_c", "finetune_c_3b"),
    Case("DiT-XL/2, 256 px", "full", "train_dit", "dit_xl2_256", ONE),
    Case("PixArt, 512 px", "LoRA", "train_pixart_lora", "pixart_xl2_512_lora", ONE),
    Case("PixArt, 512 px", "full", "train_pixart", "pixart_xl2_512", ONE),
    Case("Latte, 16 x 256 px", "full", "train_latte", "latte_xl2_ucf101", ONE),
    Case("Open-Sora 1.2, 51 x 240p", "LoRA", "train_stdit_lora", "stdit3_xl2_lora", ONE),
    Case("Open-Sora 1.2, 51 x 240p", "full", "train_stdit", "stdit3_xl2",
         ("bucket_config={}", "multi_aspect_ratio=null", "micro_batches_per_update=null", "num_frames=51",
          "image_size=424x240")),
    Case("NOVA 0.6B, 512 px", "full", "train_nova", "nova_0.6b_512", ONE),
    Case("Cosmos 2B, 1024 px", "LoRA", "train_cosmos_lora", "finetune_cosmos_2b_lora", ONE),
    Case("Cosmos 2B, 1024 px", "full", "train_cosmos", "finetune_cosmos_2b", ONE),
    Case("Cosmos 14B, 1024 px", "LoRA", "train_cosmos_lora", "finetune_cosmos_2b_lora", (*ONE, "model_version=14B")),
    Case("Cosmos 14B, 1024 px", "full", "train_cosmos", "finetune_cosmos_14b", (*ONE, "weights_dtype=float32")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=local_path, help="the page, which holds the two marks of the table")
    parser.add_argument("cases", nargs="*", help="family and method of those to count, such as 'Latte full'")
    options = parser.parse_args()
    if problem := why_no_file(options.page):
        raise UserError(f"{options.page} {problem}")
    for case in chosen(options.cases):
        found = rows(case)  # before the page is read, which another process may have changed meanwhile
        text = with_rows(read_text(options.page), case, found)
        with writing(options.page, "w") as page:
            page.write(text)
        print(*found, sep="\n", flush=True)


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of names such as 'Latte full'; all where there are none."""
    named = [case for case in CASES if not names or any(_is_called(case, name) for name in names)]
    if unknown := [name for name in names if not any(_is_called(case, name) for case in CASES)]:
        raise UserError(f"no case is called {unknown[0]}: write a family and a method, such as 'Latte full'")
    return named


def _is_called(case: Case, name: str) -> bool:
    return f"{case.family.partition(',')[0]} {case.method}" == name


def rows(case: Case, cards: Sequence[int] = CARDS) -> list[str]:
    """The rows of a case: one for each settings, with the cards for which they are the cheapest."""
    use_case, config = case.load()
    plan = Plan(as_if_cached(use_case, config, False), config, "cuda")
    found = [(_cells(plan, card), card) for card in reversed(cards)]  # the largest first, for which less is tried
    found.reverse()
    return list(_joined(case, found))


def _cells(plan: Plan, card: int) -> tuple[str, str, str] | None:
    fits, choice, needs = plan.cheapest(card * GIB)
    if not fits:
        return None
    written = on_command_line(plan.fitting.keys(choice))
    return f"`{written}`" if written else "none", gib(needs.total), gib(needs.on_cpu)


def _joined(case: Case, found: Sequence[tuple[tuple[str, str, str] | None, int]]) -> Iterator[str]:
    for cells, ones in groupby(found, key=lambda one: one[0]):
        if cells is not None:
            cards = ", ".join(str(card) for _, card in ones)
            yield f"| {' | '.join((cards, case.family, case.method, *cells, ''))} |"


def with_rows(text: str, case: Case, found: Sequence[str]) -> str:
    """The text of a page with the rows of a case in place of those that it has.

    Raises:
        UserError: the marks are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UserError(f"the page has no place for the table: write the lines {START} and {END} where it belongs")
    own = case.family, case.method
    there = [row for row in table(text) if _of(row) != own] + list(found)
    order = [(one.family, one.method) for one in CASES]
    there = [row for key in order for row in there if _of(row) == key]
    return "\n".join([f"{before}{start}\n", *HEAD, *there, f"\n{end}{after}"])


def table(text: str) -> list[str]:
    """The rows of a page's table."""
    return [line for line in text.partition(START)[2].partition(END)[0].splitlines() if line.startswith("| ")][1:]


def _of(row: str) -> tuple[str, str]:
    _, _, family, method, *_ = (cell.strip() for cell in row.split("|"))
    return family, method


if __name__ == "__main__":
    run_script(main)
