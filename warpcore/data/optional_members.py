"""Options whose input is optional per sample, such as masks: where no sample has it, the option would do nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

from warpcore.data.catalog import Catalog
from warpcore.errors import UserError


def optional_members(fields: Iterable[Any]) -> dict[str, str]:
    """Member -> the option that wants it, of those fields of a reader that do without it."""
    return dict(one.optional for one in fields if getattr(one, "optional", None))


def check_optional(
    wanted: Mapping[str, str],
    catalog: Catalog,
    counts: Mapping[str, int] | None,
    total: int = 0,
    resumed: bool = False,
) -> list[str]:
    """What to tell of options whose input is optional: how many samples have it.

    wanted: see `optional_members`. counts: samples that have a member, of `total`; None where they were not counted.
    resumed: a run that began without keeps its meaning, and is only told.

    Raises:
        UserError: no sample has it, and the run is new.
    """
    notes = []
    for member, option in wanted.items():
        if member in catalog.members and (counts is None or counts.get(member)):
            some = "some" if counts is None else f"{counts[member]} of {total}"
            notes.append(f"{option}: {some} samples have a .{member}")
            continue
        problem = (
            f"{option}: no sample has a .{member}, so it does nothing. Put NAME.{member} beside NAME.jpg and build "
            f"the data set again (tools/build_dataset.py packs it), or remove {option}"
        )
        if not resumed:
            raise UserError(problem)
        notes.append(problem)
    return notes
