"""Part `families` of `benchmarks/gpu.py`: updates of the families beside the Stable Cascade, and their peers."""

from functools import partial

from benchmarks.gpu_part import Bench, Outcome, Part, Row
from benchmarks.plain_loops import FAMILIES, Case, Family

TARGET = 0.97
"""Our update from features is at least this fast beside the plain loop where the network is the library's."""


def family_row(family: Family, case: Case, bench: Bench) -> Outcome:
    from benchmarks.family_step import FROM_FEATURES, PLAIN_LOOP, measure

    turns, updates = (1, 1) if bench.tiny else (3, 5)
    took = measure(family, case, bench.device, turns, updates)
    lines = [
        {"case": str(case), "contender": name, "ms": f"{seconds * 1000:.1f}",
         "beside the plain loop": f"{took[PLAIN_LOOP] / seconds:.2f}x"}
        for name, seconds in took.items()
    ]  # fmt: skip
    gain = took[PLAIN_LOOP] / took[FROM_FEATURES]
    missed = not bench.tiny and gain < TARGET
    return Outcome(lines, f"{gain:.2f}x is below {TARGET}x" if missed else "")


def rows(bench: Bench) -> list[Row]:
    """The first case of every family, then the others."""
    chosen = [
        (place, family, case)
        for family in FAMILIES.values()
        for place, case in enumerate(family.on_cpu[:1] if bench.tiny else family.on_gpu)
    ]
    ordered = sorted(chosen, key=lambda one: one[0])
    return [Row(case.name, partial(family_row, family, case)) for _, family, case in ordered]


PART = Part(
    "families",
    "Updates of the model families",
    "An update of a training script, from features and from pictures, beside the library's network in the plain loop "
    f"of its examples (benchmarks/family_step.py). Target: from features at least {TARGET}x.",
    ("case", "contender", "ms", "beside the plain loop"),
    rows,
)
