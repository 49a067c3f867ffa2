"""Part `families` of `benchmarks/gpu.py`: updates of the families beside the Stable Cascade, and their peers."""

from functools import partial

from benchmarks.gpu_part import Bench, Outcome, Part, Row

TARGET = 0.97
"""Our update from features is at least this fast beside diffusers' plain loop, as the network is the same."""


def sd_row(number: int, bench: Bench) -> Outcome:
    from benchmarks.sd_step import FROM_FEATURES, PLAIN_LOOP, cases, measure

    case = cases(bench.device)[number]
    turns, updates = (1, 1) if bench.tiny else (3, 5)
    took = measure(case, bench.device, turns, updates)
    lines = [
        {"case": str(case), "contender": name, "ms": f"{seconds * 1000:.1f}",
         "beside the plain loop": f"{took[PLAIN_LOOP] / seconds:.2f}x"}
        for name, seconds in took.items()
    ]  # fmt: skip
    gain = took[PLAIN_LOOP] / took[FROM_FEATURES]
    missed = not bench.tiny and gain < TARGET
    return Outcome(lines, f"{gain:.2f}x is below {TARGET}x" if missed else "")


def rows(bench: Bench) -> list[Row]:
    names = ["Stable Diffusion 1.5"] if bench.tiny else ["Stable Diffusion 1.5", "SDXL"]
    return [Row(name, partial(sd_row, number)) for number, name in enumerate(names)]


PART = Part(
    "families",
    "Updates of the model families",
    "An update of train/train_sd.py, from features and from pictures, beside diffusers' U-Net in the plain loop of "
    f"its text-to-image example (benchmarks/sd_step.py). Target: from features at least {TARGET}x.",
    ("case", "contender", "ms", "beside the plain loop"),
    rows,
)
